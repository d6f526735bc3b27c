"""What a person types: the command `hf-immunize`."""
