"""Which answers to a prompt say the same: the server asks it of all ballots, a client of its own draws.

Legend: P prompts, B ballots to each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

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


def choices(draws: Sequence[Sequence[str]]) -> tuple[list[str], list[int]]:
    """A client's choice from its draws: for each prompt the answer that it gave most often, of several the one that it
    drew first, in the words of that draw; and how many of the draws say so, 0 with an empty text if none says anything.

    Args:
        draws: For each draw P answers.
    """
    answers, counts = list[str](), list[int]()
    for to_prompt in zip(*draws, strict=True):
        said = [opinion_of(answer) for answer in to_prompt if answer]
        most, count = Counter(said).most_common(1)[0] if said else ("", 0)  # of equals that which was first
        answers.append(next((answer for answer in to_prompt if answer and opinion_of(answer) == most), ""))
        counts.append(count)
    return answers, counts
