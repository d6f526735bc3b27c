"""Benchmarks, one part a module with ``run() -> dict``; ``python -m benchmarks [part ...]`` runs them."""
