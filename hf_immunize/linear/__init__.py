"""The paper's linear setting."""
