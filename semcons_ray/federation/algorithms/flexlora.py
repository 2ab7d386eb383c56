"""FlexLoRA: the server averages the products B_k A_k, and factors the average by SVD for each client's rank.

Source: J. Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv:2402.11505. The mean of products is not the product of means: averaging products averages the models' updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import mean_product, pack, truncated_svd, unpack, with_rank
from semcons_ray.messages import AdapterUpdate
from semcons_ray.modeling.adapter import Adapter


@dataclass(frozen=True)
class FlexLora(FedAvgLora):
    """FedAvg over the products B A, by truncated SVD."""

    factors_only: ClassVar[bool] = True
    any_ranks: ClassVar[bool] = True
    can_hear_late: ClassVar[bool] = False

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The mean of the products, weighted by private examples, as an adapter of the clients' highest rank."""
        adapters = [unpack(update.tensors) for update in updates]
        product = mean_product(adapters, [update.num_examples for update in updates])
        return pack(truncated_svd(product, max(self.ranks)), "float32")

    def share(self, average: Adapter, rank: int) -> Adapter:
        """The first `rank` singular components of the average, which are its best approximation of that rank."""
        return with_rank(average, rank)
