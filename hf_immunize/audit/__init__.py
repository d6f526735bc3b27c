"""The audit: a preset of attackers on a model and its reference, and the report of what they found."""
