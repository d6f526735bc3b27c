"""Metrics in the form of `evaluate` modules, to be loaded from their path."""
