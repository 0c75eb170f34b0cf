"""Other models as teachers."""
