"""Candidates against fine-tuning attackers and probes of earlier layers, and what the audit finds of each."""
