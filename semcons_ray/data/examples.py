"""The types of examples (a question with its answer) and of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from semcons_ray.data.losses import Tally
from semcons_ray.messages import Prompt


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its reference response.

    Attributes:
        prompt: The question, or a conversation that ends in it.
        response: The answer; "" for a public prompt that has none.
        category: The category it belongs to; "" where the data names none.
        options: The answers to choose from, of a multiple-choice question; the response is one of them.
        owner: The client that it belongs to; "" where the data names none.
    """

    prompt: Prompt
    response: str
    category: str = ""
    options: tuple[str, ...] = ()
    owner: str = ""


@dataclass(frozen=True)
class DataSet:
    """The usable examples of a data set.

    Attributes:
        examples: The examples, whose prompts are all different.
        tally: A count of the rows that are left out.
        turns: A count of the turns that are left out of conversations; None if none are.
    """

    examples: Sequence[Example]
    tally: Tally
    turns: Tally | None = None
