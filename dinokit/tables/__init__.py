"""Embedding tables: their formats, and the run that makes one and can be resumed."""
