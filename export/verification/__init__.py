"""Compares each file with torch, measures it, and reports the result."""
