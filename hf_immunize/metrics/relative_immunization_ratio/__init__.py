"""The relative immunization ratio as an `evaluate` module; see its README.md."""
