"""FlexLoRA: the server averages the products B_k A_k, and splits the average anew by SVD, to each client's rank.

Source: J. Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv:2402.11505. The mean of products is not the product of means: this averages what the models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import mean_product, pack, truncated_svd, unpack, with_rank
from semcons_ray.messages import AdapterUpdate
from semcons_ray.modeling.adapter import Adapter


@dataclass(frozen=True)
class FlexLora(FedAvgLora):
    """FedAvg over products, by truncated SVD."""

    def aggregate(self, round: int, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The best adapter of the greatest rank for the mean product, weighted by private examples."""
        adapters = [unpack(update.tensors) for update in updates]
        product = mean_product(adapters, [update.num_examples for update in updates])
        return pack(truncated_svd(product, max(self.ranks)), "float32")

    def share(self, average: Adapter, rank: int) -> Adapter:
        """The first `rank` singular components, which are the best adapter of that rank."""
        return with_rank(average, rank)
