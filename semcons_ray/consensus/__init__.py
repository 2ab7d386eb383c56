"""Semantic consensus: which client's answer to a public prompt becomes its pseudo-label.

An averaged embedding cannot be decoded into text, so every rule elects one of the clients' answers. All of it is
batched tensor math, on any device.
"""

from semcons_ray.consensus.form import NORM_TOLERANCE, Consensus, Election, Facts, form_consensus

__all__ = ["NORM_TOLERANCE", "Consensus", "Election", "Facts", "form_consensus"]
