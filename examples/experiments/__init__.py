"""The experiments behind docs/results/networks.md: backbone x task x method x seed, one command a row.

python -m examples.experiments --help
"""
