"""Backbone, projection head and their initial weights."""
