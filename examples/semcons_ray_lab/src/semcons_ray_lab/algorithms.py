"""An algorithm of one's own: FedAvg on LoRA adapters that no single client can move far."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import pack, unpack
from semcons_ray.messages import AdapterUpdate


@dataclass(frozen=True)
class TrimmedMean(FedAvgLora):
    """The mean of each coordinate without its highest and lowest values.

    Source: D. Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv:1803.01498,
    definition 2, on the A and B of LoRA adapters.

    An algorithm that averages weights replaces what is different in `FedAvgLora`: here how the server aggregates. Any
    other has the methods of `semcons_ray.federation.fleet.Algorithm`. New fields are its options (algorithm.options);
    those of the class above are filled in.

    Attributes:
        trim: Share of the clients' values that is left out at each end, rounded down to whole clients.
    """

    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The server's next state, from the clients' adapters; all clients have the same weight."""
        adapters = [unpack(update.tensors) for update in updates]
        left_out = int(self.trim * len(adapters))
        kept = slice(left_out, len(adapters) - left_out)
        ordered = {key: torch.stack([adapter[key] for adapter in adapters]).sort(dim=0).values for key in adapters[0]}
        return pack({key: values[kept].mean(dim=0) for key, values in ordered.items()}, "float32")
