"""Token probabilities in messages: how they are packed, checked and averaged.

Legend: P public prompts, T tokens of an answer, N tokens of all answers of a message, K likeliest tokens of a place.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semcons_ray.errors import MessageError

TOKEN, PROBABILITY = np.dtype("<u4"), np.dtype("<f2")
"""Types in messages: 6 bytes for each likely token of a place."""

ROUNDING = 1e-2
"""How far the probabilities of a place may add up to more than 1, by rounding to half precision."""


@dataclass(frozen=True)
class TokenProbabilities:
    """Answers to P prompts as token ids, and what a model holds likely at each of their places.

    Attributes:
        answers: For each prompt T token ids, at least one.
        tokens: The likeliest tokens after the prompt and the answer's tokens before: for each prompt (T, K) uint32.
        probabilities: Their probabilities among all tokens, (T, K) float16 each.
    """

    answers: tuple[tuple[int, ...], ...]
    tokens: tuple[NDArray[np.uint32], ...]
    probabilities: tuple[NDArray[np.float16], ...]

    def packed(self) -> tuple[bytes, bytes]:
        """Tokens and probabilities of all places, (N, K) each, as bytes."""
        return (
            b"".join(one.astype(TOKEN).tobytes() for one in self.tokens),
            b"".join(one.astype(PROBABILITY).tobytes() for one in self.probabilities),
        )

    @classmethod
    def unpacked(
        cls, answers: tuple[tuple[int, ...], ...], tokens: bytes, probabilities: bytes, top_k: int
    ) -> TokenProbabilities:
        """TokenProbabilities as they came in a message.

        Args:
            answers: See `TokenProbabilities`.
            tokens: What `packed` made of them.
            probabilities: The same.
            top_k: The number K that is expected.

        Raises:
            MessageError: An answer is empty, there are not K different tokens and probabilities for each of its places,
                or the probabilities of a place are none.
        """
        if not all(answers):
            raise MessageError("scores: an answer without a token")
        ends = [*itertools.accumulate(map(len, answers))]
        values = (ends[-1] if ends else 0) * top_k
        if (len(tokens), len(probabilities)) != (values * TOKEN.itemsize, values * PROBABILITY.itemsize):
            raise MessageError(f"scores: not {top_k} tokens and probabilities for each token of an answer")
        chances = np.frombuffer(probabilities, PROBABILITY).reshape(-1, top_k)
        sums = chances.astype(np.float64).sum(axis=1)
        if not ((chances >= 0).all() and (sums > 0).all() and (sums <= 1 + ROUNDING).all()):
            raise MessageError("scores: numbers that are no probabilities")
        likely = np.frombuffer(tokens, TOKEN).reshape(-1, top_k)
        ascending = np.sort(likely, axis=1)
        if (ascending[:, 1:] == ascending[:, :-1]).any():
            raise MessageError("scores: a token twice at one place")
        return cls(
            answers,
            tuple(np.split(likely, ends)[:-1]),
            tuple(np.split(chances, ends)[:-1]),
        )


def most_common(given: Sequence[TokenProbabilities], priorities: NDArray[np.float64]) -> list[int]:
    """Who gave the answer to each prompt that most gave; of several such answers that of the highest priority, (P, C),
    wins."""
    winners = []
    for prompt, to_prompt in enumerate(zip(*(scores.answers for scores in given), strict=True)):
        counts = Counter(to_prompt)
        most = max(counts.values())
        tied = [place for place, answer in enumerate(to_prompt) if counts[answer] == most]
        winners.append(max(tied, key=lambda place: float(priorities[prompt, place])))
    return winners


def averaged(given: Sequence[TokenProbabilities], winners: Sequence[int], top_k: int) -> TokenProbabilities:
    """The mean probabilities at each place of the elected answers, over those whose own answer begins with the same
    tokens up to there: at the first place over all.

    A token that is not among a client's K likeliest counts as 0. Of the means the K largest are kept, and add up to 1.
    Sums are exact, so their order, which is that of client ids, decides nothing.

    Args:
        given: TokenProbabilities of each client.
        winners: Whose answer to each prompt is elected, as a place in `given`, (P,).
        top_k: The number K.
    """
    answers = tuple(given[winner].answers[prompt] for prompt, winner in enumerate(winners))
    tokens, probabilities = [], []
    for prompt, answer in enumerate(answers):
        places = [_mean(given, prompt, answer[:place], top_k) for place in range(len(answer))]
        tokens.append(np.stack([likely for likely, _ in places]))
        probabilities.append(np.stack([chances for _, chances in places]))
    return TokenProbabilities(answers, tuple(tokens), tuple(probabilities))


def _mean(
    given: Sequence[TokenProbabilities], prompt: int, before: tuple[int, ...], top_k: int
) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    place = len(before)
    alike = [one for one in given if len(one.answers[prompt]) > place and one.answers[prompt][:place] == before]
    tokens, owner = np.unique(np.concatenate([one.tokens[prompt][place] for one in alike]), return_inverse=True)
    # Of half precision, thousands add up in double precision without rounding.
    sums = np.bincount(owner, np.concatenate([one.probabilities[prompt][place] for one in alike]).astype(np.float64))
    best = np.lexsort((tokens, -sums))[:top_k]
    return tokens[best], (sums[best] / sums[best].sum()).astype(np.float16)
