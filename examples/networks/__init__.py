"""The experiments on networks: one command a row, resumable, and the page made from the rows.

python -m examples.networks --help
"""
