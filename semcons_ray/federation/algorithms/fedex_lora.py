"""FedEx-LoRA: FedAvg on A and B, and what their means lose of the mean update stays beside the base weights.

Source: R. Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
Models", arXiv:2410.09432: all clients go on with mean(B_k) and mean(A_k), and the residual
mean(B_k A_k) - mean(B_k) mean(A_k) is added to the frozen weights, so that the model has exactly the mean update.

Where this departs from it: means are weighted by private examples, w_k. The residual is not merged into the base
weights but kept in a frozen adapter beside them, for FLoRA's reason (see flora.py), and sent as FLoRA's stacks are. It
is sent as factors, without loss. It equals the sum of w_k (B_k - B_1) (A_k - mean A): B_1, which may be any client's,
takes the place of mean B, since the sum of w_k (A_k - mean A) is 0. So n clients of rank r have a residual of rank
r (n - 1), and one client has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semcons_ray.federation.algorithms.flora import Flora
from semcons_ray.federation.weights import check_shapes, factors, pack, shapes_of, stacked, weighted_mean
from semcons_ray.modeling.adapter import Adapter

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class FedExLora(Flora):
    """FedAvg-LoRA with the residual of the averages, which is kept as FLoRA's stacks are."""

    any_ranks: ClassVar[bool] = False

    def stacks(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Adapter]:
        """The residual, of rank r (n - 1) for n adapters."""
        first, *others = adapters
        mean = weighted_mean(adapters, weights)
        apart = [
            {key: each[key] - start[key] for a, b in factors(each) for key, start in ((a, mean), (b, first))}
            for each in others
        ]
        return [stacked(apart, [weight / sum(weights) for weight in weights[1:]])] if apart else []

    def average(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> bytes:
        """The means of A and of B."""
        return pack(weighted_mean(adapters, weights), "float32")

    def received_rank(self, rank: int, missed: Sequence[Sequence[int]]) -> int:
        """The rank of the means, and those of all residuals that the client lacks."""
        return rank + sum(rank * (len(participants) - 1) for participants in missed)

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Put the residuals that were missed beside the base model, and go on with the means of A and B."""
        tensors, fresh = self.received_tensors(round, downlink), client.fresh_adapter()
        average = {key: tensors.pop(key) for key in fresh if key in tensors}
        if downlink:
            check_shapes(average, shapes_of(fresh))
        self.keep(client, tensors)
        client.adapter = {**fresh, **average}
