"""Attackers, the audit that runs them, and its report."""
