"""One question with its answer, and many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from semcons_ray.data.losses import Tally


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, its reference response, and the category it belongs to ("" where the data names none)."""

    prompt: str
    response: str
    category: str = ""


@dataclass(frozen=True)
class DataSet:
    """The examples of a data set that can be used, with distinct prompts, and a count of its other rows."""

    examples: Sequence[Example]
    tally: Tally
