"""Federated fine-tuning of language models by semantic consensus, simulated on Ray."""

__version__ = "0.1.0"
