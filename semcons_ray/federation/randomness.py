"""Random numbers: one independent stream for each (experiment, round, client, stage), and no global seed.

A stream is a pure function of those four, so a client needs no random state on disk: visited again after a crash,
on another worker or in another order, it draws the same numbers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Stage = Literal["participation", "fine_tune", "generate", "evaluate", "consensus"]
_STAGES: dict[Stage, int] = {"participation": 1, "fine_tune": 2, "generate": 3, "evaluate": 4, "consensus": 5}

SERVER = -1


def stream(seed: int, round: int, client_id: int, stage: Stage) -> np.random.Generator:
    """The generator of one stage; `client_id` is SERVER for the server's own."""
    return np.random.default_rng(np.random.SeedSequence([seed, round, client_id + 1, _STAGES[stage]]))


def sample_clients(seed: int, round: int, num_clients: int, participation: float) -> tuple[int, ...]:
    """Clients of a round, drawn without replacement: `participation` of all, at least one, in ascending order."""
    count = max(1, round_half_up(participation * num_clients))
    chosen = stream(seed, round, SERVER, "participation").choice(num_clients, size=count, replace=False)
    return tuple(sorted(int(client) for client in chosen))


def round_half_up(value: float) -> int:
    """Nearest integer, halves up."""
    return int(np.floor(value + 0.5))
