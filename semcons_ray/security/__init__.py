"""Attacks on the consensus, and what answers tell of private data."""
