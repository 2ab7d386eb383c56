"""The types of examples (a question with its answer) and of data sets."""

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
    """The usable examples of a data set, whose prompts are all different, and a count of the rows left out."""

    examples: Sequence[Example]
    tally: Tally
