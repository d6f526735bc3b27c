"""The Trainer, its arguments, objectives and weights."""
