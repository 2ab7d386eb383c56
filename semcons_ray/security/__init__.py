"""Clients that mean harm: what they send, and how much of the labels they win."""
