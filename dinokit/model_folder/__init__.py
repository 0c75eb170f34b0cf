"""The model folder: its files, weights and names, read, checked and written."""
