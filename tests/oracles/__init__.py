"""Slow, independent statements of what the operators compute."""
