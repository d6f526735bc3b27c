"""What an adversary does with a model: each attack is one `Attacker`, and `presets` has the list of them."""
