"""Which answers to a prompt say the same: the server asks it of all ballots, a client of its own draws.

Legend: P prompts, B ballots to each.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

_WORDS = re.compile(r"-?\w+(?:[.,/]\w+)*")
"""Words and numbers; a sign, a decimal point or a slash makes another number."""


def opinion_of(answer: str) -> str:
    """What an answer says: its words without case, spaces and punctuation, or the answer itself if it has none."""
    return " ".join(_WORDS.findall(answer.casefold())) or answer


def opinions_of(answers: Sequence[Sequence[str]]) -> Tensor:
    """Which answers to a prompt are the same text but for case, spaces and punctuation, (P, B) int64.

    Args:
        answers: For each of B ballots P answers.
    """
    numbers = [_numbered([opinion_of(answer) for answer in to_prompt]) for to_prompt in zip(*answers, strict=True)]
    return torch.tensor(numbers, dtype=torch.int64).reshape(-1, len(answers))


def _numbered(texts: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    return [first.setdefault(text, place) for place, text in enumerate(texts)]


def reduced(
    draws: Sequence[Sequence[str]], send: Literal["counted", "choice"]
) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]]]:
    """A client's draws as fewer answers, each with the number of draws that say the same.

    Args:
        draws: For each draw P answers; empty ones count for nothing.
        send: counted: each distinct answer, in the words and the order in which they were drawn first; choice: the most
            common one, of several the one drawn first.

    Returns:
        For each ballot P answers and P counts. Where a prompt has fewer answers than another they are empty, and 0.
    """
    to_prompts = []
    for to_prompt in zip(*draws, strict=True):
        counts = Counter(opinion_of(answer) for answer in to_prompt if answer)
        words = {opinion_of(answer): answer for answer in reversed(to_prompt)}
        answers = [(words[opinion], count) for opinion, count in counts.items()] or [("", 0)]
        to_prompts.append(answers if send == "counted" else [max(answers, key=lambda one: one[1])])
    ballots = [*itertools.zip_longest(*to_prompts, fillvalue=("", 0))]
    return [tuple(text for text, _ in one) for one in ballots], [tuple(count for _, count in one) for one in ballots]
