"""Centralised training, the upper bound for federated learning: one model is trained on all private data.

Client 0 is given the private data of all clients, which no federation would allow, and trains for as many rounds as a
federation would. Its epochs are over all data: as many steps as all clients' epochs together, but one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from semcons_ray.federation.algorithms.local_only import LocalOnly
from semcons_ray.federation.fleet import RoundOutcome, Visitor
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerProtocol


@dataclass(frozen=True)
class Centralized(LocalOnly):
    """Local training of client 0, which holds all data; its evaluation counts for every client."""

    any_models: ClassVar[bool] = False

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Let client 0 train; see LocalOnly.run_round."""
        alone = LocalOnly(Cohort(num_clients=1, participation=1.0, seed=self.cohort.seed))
        outcome = alone.run_round(round, state, fleet, server, evaluate=evaluate)
        evaluations = dict.fromkeys(range(self.cohort.num_clients), outcome.evaluations[0])
        return RoundOutcome(replies=outcome.replies, next_state=b"", evaluations=evaluations)
