"""Random numbers: one independent stream for each (experiment, round, client, stage), and no global seed.

A stream is a pure function of those four, so a client needs no random state on disk: visited again after a crash,
on another worker or in another order, it draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Stage = Literal["participation", "fine_tune", "generate", "evaluate", "consensus", "adapter"]
_STAGES: dict[Stage, int] = {
    "participation": 1,
    "fine_tune": 2,
    "generate": 3,
    "evaluate": 4,
    "consensus": 5,
    "adapter": 6,
}

SERVER = -1


def stream(seed: int, round: int, client_id: int, stage: Stage) -> np.random.Generator:
    """The random generator of one stage of a client's round; `client_id` is `SERVER` for the server's own draws."""
    return np.random.default_rng(np.random.SeedSequence([seed, round, client_id + 1, _STAGES[stage]]))


@dataclass(frozen=True)
class Cohort:
    """Who takes part in a round: a share `participation` of all clients, at least one, drawn without replacement.

    Attributes:
        num_clients: Number of all clients.
        participation: The share.
        seed: The experiment's seed.
        num_rounds: How many rounds there are; None: it is not known.
        hears_late: Whether answers that come after the round in which their client was asked count in a later one.
    """

    num_clients: int
    participation: float
    seed: int
    num_rounds: int | None = None
    hears_late: bool = False

    def sample(self, round: int) -> tuple[int, ...]:
        """Clients of a round, in ascending order."""
        count = max(1, int(self.participation * self.num_clients + 0.5))
        drawn = stream(self.seed, round, SERVER, "participation").choice(self.num_clients, size=count, replace=False)
        return tuple(sorted(drawn.tolist()))

    def awaited(self, round: int) -> Sequence[int]:
        """Clients whose answers may count in a round, ascending."""
        return self.members if self.hears_late else self.sample(round)

    @cached_property
    def members(self) -> Sequence[int]:
        """Clients that take part in any round, ascending; all, where the number of rounds is not known."""
        if self.num_rounds is None or self.participation >= 1:
            return range(self.num_clients)
        return sorted({client for round in range(1, self.num_rounds + 1) for client in self.sample(round)})


def priorities(seed: int, round: int, client_ids: Sequence[int], num_prompts: int) -> NDArray[np.float64]:
    """Random numbers that decide ties between answers, (P, C) in [0, 1): for each prompt, the client with the highest
    wins.

    Each client's numbers are from its own stream, so they depend neither on who else takes part nor on who answers
    first.
    """
    drawn = [stream(seed, round, client_id, "consensus").random(num_prompts) for client_id in client_ids]
    return np.stack(drawn, axis=1) if drawn else np.empty((num_prompts, 0))
