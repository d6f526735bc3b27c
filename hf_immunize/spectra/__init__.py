"""Linear algebra of feature matrices. Imports torch alone."""
