"""Each file compared with torch, measured, and reported."""
