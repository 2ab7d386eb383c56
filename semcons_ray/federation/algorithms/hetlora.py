"""HetLoRA: clients of different ranks; adapters are padded with zeros to be averaged, and truncated for each client.

Source: Y. J. Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
arXiv:2401.06432: zero-padding, truncation, and sparsity-weighted aggregation, in which a client's weight is the
Frobenius norm of its update B_k A_k. The paper's self-pruning of ranks is left out: ranks are those that the user sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import pack, unpack, update_norm, weighted_mean, with_rank
from semcons_ray.messages import AdapterUpdate
from semcons_ray.modeling.adapter import Adapter


@dataclass(frozen=True)
class HetLora(FedAvgLora):
    """FedAvg-LoRA over zero-padded adapters."""

    factors_only: ClassVar[bool] = True
    any_ranks: ClassVar[bool] = True

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The means of the padded A and B over clients, weighted by the norms of the clients' updates."""
        norms = [update_norm(unpack(update.tensors)) for update in updates]
        adapters = (with_rank(unpack(update.tensors), max(self.ranks)) for update in updates)
        # All norms are 0 if nobody has learnt anything; then all clients have the same weight.
        return pack(weighted_mean(adapters, norms if any(norms) else [1.0] * len(norms)), "float32")

    def share(self, average: Adapter, rank: int) -> Adapter:
        """The first `rank` components of the average."""
        return with_rank(average, rank)
