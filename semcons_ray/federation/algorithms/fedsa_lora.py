"""FedSA-LoRA: clients train A and B, and share only A; each keeps a B, and so a model, of its own.

Source: P. Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv:2410.01463: A learns
what is common to all clients, and B what is a client's own. The server averages A_k, and client k goes on with the mean
and with its B_k. Here the mean is weighted by private examples, as in FedAvg.

A client that takes part is measured after the round with the new mean of A and its own B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import Shapes, shapes_of
from semcons_ray.messages import AdapterUpdate
from semcons_ray.modeling.adapter import Adapter

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class FedSaLora(FedAvgLora):
    """FedAvg-LoRA of A alone."""

    factors_only: ClassVar[bool] = True
    own_models: ClassVar[bool] = True
    can_hear_late: ClassVar[bool] = False

    def alike(self, updates: Sequence[AdapterUpdate]) -> Mapping[int, Sequence[int]]:
        """Each client that sent its A has a model of its own."""
        return {update.client_id: [update.client_id] for update in updates}

    def exchanged(self, shapes: Shapes) -> Shapes:
        """Shapes of A only."""
        return {key: shape for key, shape in shapes.items() if "lora_A" in key}

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Set the client's A to the average; its B stays."""
        client.adapter |= self.sent(round, downlink, self.exchanged(shapes_of(client.adapter)))

    def trained(self, client: Client) -> Adapter:
        """The client's A only."""
        return {key: value for key, value in client.adapter.items() if "lora_A" in key}
