"""Local training, the lower bound: every client fine-tunes on its own private data, and nothing crosses the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from semcons_ray.federation.fleet import RoundOutcome, Visitor, own_evaluations
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerProtocol
from semcons_ray.messages import NO_LABELS, PseudoLabels

if TYPE_CHECKING:  # the driver and the server run algorithms without loading transformers
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class LocalOnly:
    """One round of training apart.

    Attributes:
        cohort: Who takes part in a round.
        self_labels: Whether clients also train on their own answers to the public prompts: the control that shows what
            a consensus of one is worth.
        first_exchange: Round after which others would first exchange answers; their own they learn after it, too.
    """

    cohort: Cohort
    self_labels: bool = False
    first_exchange: int = 1

    @property
    def uses_public_prompts(self) -> bool:
        """Only to label them."""
        return self.self_labels

    def first_state(self) -> bytes:
        """The server has nothing to remember."""
        return b""

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """Nothing is sent."""
        return dict.fromkeys(client_ids, b"")

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Let every participant train; see SemanticConsensus.run_round."""
        downlinks = self.downlinks(round, state, self.cohort.sample(round))
        return train_apart(round, state, downlinks, fleet, evaluate=evaluate)

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """Train on private data; send nothing."""
        client.fine_tune(round, own_labels(client, round, self.first_exchange) if self.self_labels else NO_LABELS)
        return b""

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """A client's model is its own."""


def train_apart(
    round: int, state: bytes, downlinks: Mapping[int, bytes], fleet: Visitor, *, evaluate: bool
) -> RoundOutcome:
    """A round in which nothing is exchanged, so that the server's state stays as it is."""
    replies = tuple(sorted(fleet.visit(round, downlinks, evaluate=evaluate), key=lambda reply: reply.client_id))
    return RoundOutcome(replies=replies, next_state=state, evaluations=own_evaluations(replies))


def own_labels(client: Client, round: int, first_exchange: int) -> PseudoLabels:
    """What a client labels the public prompts with for itself: when a semantic consensus would have labels, it does."""
    return client.label_prompts(round) if round > first_exchange else NO_LABELS
