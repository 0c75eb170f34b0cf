"""int8: which weights and activations are quantised, and how."""
