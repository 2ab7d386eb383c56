"""Scores of answers against references."""
