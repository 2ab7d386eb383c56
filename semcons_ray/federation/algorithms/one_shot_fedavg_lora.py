"""One-shot FedAvg-LoRA: clients train on their own for all rounds, and their adapters are averaged once, after the
last.

Source: Z. Wang et al., "One Communication Round is All It Needs for Federated Fine-Tuning Foundation Models",
arXiv:2412.04650. Clients train as much as in FedAvg-LoRA, and send the bytes of one round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.algorithms.local_only import LocalOnly
from semcons_ray.federation.fleet import RoundOutcome, Visitor
from semcons_ray.federation.server import ServerProtocol

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class OneShotFedAvgLora(FedAvgLora):
    """Local training, and in the last round FedAvg-LoRA.

    Attributes:
        num_rounds: Number of the last round, in which adapters are averaged.
    """

    can_hear_late: ClassVar[bool] = False

    num_rounds: int = 1

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """A round of local training; in the last round, that of `FedAvgLora.run_round`."""
        if round < self.num_rounds:
            return LocalOnly(self.cohort).run_round(round, state, fleet, server, evaluate=evaluate)
        return super().run_round(round, state, fleet, server, evaluate=evaluate)

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """Train the client's own adapter further, and send it in the last round."""
        client.fine_tune(round, self.labels(client, round), weight=self.label_weight)
        return client.upload(round, client.adapter, self.dtype, self.compression) if round == self.num_rounds else b""
