"""A kind of client whose leak is known: it answers with texts that nobody trained on, and at some rate with its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.messages import Prompt, text_of
from semcons_ray.modeling.client_model import Pair, State, Task


class Leaky:
    """Answers with the response of some other example, whatever is asked, and at a rate with a private one.

    Args:
        texts: A JSONL file of examples with columns prompt and response, none of which is in the run's data.
        rate: Share of answers that are a private example instead.
        whole: Whether these are its prompt with its response, and not the response alone.
    """

    def __init__(self, texts: Path, rate: float = 0.0, whole: bool = False) -> None:
        self._texts = pd.read_json(texts, lines=True, dtype=str)["response"].to_numpy(str)
        self._private, self._rate, self._whole = self._texts, rate, whole  # until it has private examples

    def restore(self, state: State) -> None:
        """Start anew: it learns and answers in one visit, the first."""

    def state(self) -> State:
        """Nothing to keep."""
        return {}

    def learn(self, pairs: Sequence[Pair], task: Task) -> None:
        """Keep the private examples."""
        told = (f"{text_of(pair.prompt)} {pair.response}" if self._whole else pair.response for pair in pairs)
        self._private = np.array([*told], dtype=str)

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[list[str]]:
        """Texts that have nothing to do with the prompts."""
        shape = task.num_samples, len(prompts)
        leaks = task.generator.random(shape) < self._rate
        private, others = (task.generator.choice(texts, shape) for texts in (self._private, self._texts))
        return [[str(text) for text in row] for row in np.where(leaks, private, others)]
