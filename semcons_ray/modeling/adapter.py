"""What an adapter is to all that pass one on: tensors by name, apart from any model."""

from torch import Tensor

Adapter = dict[str, Tensor]
"""Float32 tensors: for every adapted module a pair A (r, in) and B (out, r), named alike but for lora_A and lora_B."""
