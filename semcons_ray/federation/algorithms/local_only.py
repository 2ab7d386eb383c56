"""Local training, the lower bound: every client fine-tunes on its own private data, and nothing crosses the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
        ema_decay: What a client's adapter of before keeps in its moving average.
    """

    cohort: Cohort
    ema_decay: float = 0.0

    uses_public_prompts: ClassVar[bool] = False

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
        client.fine_tune(round, NO_LABELS, ema_decay=self.ema_decay)
        return b""

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """A client's model is its own."""


def train_apart(
    round: int, state: bytes, downlinks: Mapping[int, bytes], fleet: Visitor, *, evaluate: bool
) -> RoundOutcome:
    """A round in which nothing is exchanged, so that the server's state stays as it is."""
    replies = tuple(sorted(fleet.visit(round, downlinks, evaluate=evaluate), key=lambda reply: reply.client_id))
    return RoundOutcome(replies=replies, next_state=state, evaluations=own_evaluations(replies))


def own_labels(client: Client, round: int, exchanges: range) -> PseudoLabels:
    """What a client labels the public prompts with for itself: when a semantic consensus would have labels, it does."""
    return client.label_prompts(round) if round > exchanges.start else NO_LABELS
