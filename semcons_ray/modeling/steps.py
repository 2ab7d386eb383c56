"""Which texts are trained on together: rows, which several may share, and the rows of each optimizer step."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from semcons_ray.config import TrainingConfig
from semcons_ray.modeling.client_model import Targets

LENGTH_WINDOW = 8
"""Number of steps whose examples are sorted by length together: less padding, and steps are still random."""


class Segment(NamedTuple):
    """A text in a row of a batch, which may have several.

    Attributes:
        ids: Its tokens.
        learnt: Where its responses are, which are learnt or scored: for each, the first place and the one after the
            last.
        weight: Weight of their tokens in the loss.
        targets: What is learnt at these places instead of the tokens that are there; None: those.
    """

    ids: list[int]
    learnt: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0
    targets: Targets | None = None

    @property
    def num_learnt(self) -> int:
        """How many of its tokens are responses'."""
        return sum(end - begin for begin, end in self.learnt)


def pack(lengths: Sequence[int], room: int, generator: np.random.Generator) -> list[list[int]]:
    """Rows of examples, by index, with at most `room` tokens each.

    Best fit, the longest first: each goes into the fullest row that has room for it. `generator` decides between
    examples of one length.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room that is left in a row, and the row; ascending
    for i in sorted(generator.permutation(len(lengths)).tolist(), key=lambda i: -lengths[i]):
        place = bisect_left(free, (lengths[i], 0))
        left, row = free.pop(place) if place < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(free, (left - lengths[i], row))
    return rows


def num_steps(num_rows: int, training: TrainingConfig) -> int:
    """The number of steps that `steps_of` yields."""
    return training.local_steps or training.local_epochs * math.ceil(num_rows / training.step_size)


def steps_of(lengths: Sequence[int], training: TrainingConfig, generator: np.random.Generator) -> Iterator[list[int]]:
    """Indices of the rows of each optimizer step, in `local_epochs` passes, or as many as `local_steps` needs."""
    size, steps = training.step_size, 0
    epochs = training.local_epochs if training.local_steps is None else training.local_steps
    for _ in range(epochs):
        order = generator.permutation(len(lengths))
        drawn: list[list[int]] = []
        for start in range(0, len(order), size * LENGTH_WINDOW):
            window = sorted(order[start : start + size * LENGTH_WINDOW].tolist(), key=lambda i: lengths[i])
            drawn += [window[i : i + size] for i in range(0, len(window), size)]
        for index in generator.permutation(len(drawn)):
            yield drawn[index]
            steps += 1
            if steps == training.local_steps:
                return
