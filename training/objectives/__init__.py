"""Losses, targets and teachers: what the student is trained on."""
