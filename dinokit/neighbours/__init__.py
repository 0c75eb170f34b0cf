"""The nearest of many vectors: search, indices, duplicates, selection."""
