"""The type of an adapter's tensors, for code that handles adapters apart from a model."""

from torch import Tensor

Adapter = dict[str, Tensor]
"""Float32 tensors by name: for every adapted module A (r, in) and B (out, r), whose names differ in lora_A and lora_B
only, and with DoRA the size of each output's weights (out,)."""
