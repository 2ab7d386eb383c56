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
    """Local training, with a moving average of each client's adapters if `ema_decay` is not 0.

    Attributes:
        cohort: Who takes part in a round.
        ema_decay: Weight of a client's old adapter in its moving average; see `Client.fine_tune`.
    """

    cohort: Cohort
    ema_decay: float = 0.0

    uses_public_prompts: ClassVar[bool] = False
    any_models: ClassVar[bool] = True
    any_ranks: ClassVar[bool] = True

    def first_state(self) -> bytes:
        """Empty: the server has nothing to remember."""
        return b""

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """Empty messages: nothing is sent."""
        return dict.fromkeys(client_ids, b"")

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Let every participant train; see `Algorithm.run_round`."""
        downlinks = self.downlinks(round, state, self.cohort.sample(round))
        return train_apart(round, state, downlinks, fleet, evaluate=evaluate)

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """Train on private data; send nothing."""
        client.fine_tune(round, NO_LABELS, ema_decay=self.ema_decay)
        return b""

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Nothing to do: a client's model is its own."""


def train_apart(
    round: int, state: bytes, downlinks: Mapping[int, bytes], fleet: Visitor, *, evaluate: bool
) -> RoundOutcome:
    """A round in which clients train and send nothing, so that the server's state stays as it is."""
    replies = tuple(sorted(fleet.visit(round, downlinks, evaluate=evaluate), key=lambda reply: reply.client_id))
    return RoundOutcome(replies=replies, next_state=state, evaluations=own_evaluations(replies))


def own_labels(client: Client, round: int, exchanges: range) -> PseudoLabels:
    """A client's own answers to the public prompts, from the round in which semantic consensus would have
    pseudo-labels.

    Args:
        client: The client.
        round: The round, from 1.
        exchanges: Rounds in which clients of semantic consensus answer.
    """
    return client.label_prompts(round) if round > exchanges.start else NO_LABELS
