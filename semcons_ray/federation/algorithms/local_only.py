"""Local training, the lower bound: every client fine-tunes on its own private data, and nothing crosses the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semcons_ray.federation.fleet import RoundOutcome, Visitor
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerProtocol
from semcons_ray.messages import NO_LABELS

if TYPE_CHECKING:  # the driver and the server run algorithms without loading transformers
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class LocalOnly:
    """One round of training apart."""

    cohort: Cohort

    uses_public_prompts: ClassVar[bool] = False

    def first_downlink(self) -> bytes:
        """Nothing is sent."""
        return b""

    def run_round(
        self, round: int, downlink: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Let every participant train; see SemanticConsensus.run_round."""
        visits = fleet.visit(round, dict.fromkeys(self.cohort.sample(round), b""), evaluate=evaluate)
        return RoundOutcome(replies=tuple(sorted(visits, key=lambda reply: reply.client_id)), next_downlink=b"")

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """Train on private data; send nothing."""
        client.fine_tune(round, NO_LABELS)
        return b""
