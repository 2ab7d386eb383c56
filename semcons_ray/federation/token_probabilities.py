"""Token probabilities in messages: how they are packed, checked and averaged.

Legend: P public prompts, T tokens of an answer, N tokens of all answers of a message, K likeliest tokens of a place.
"""

from __future__ import annotations

import itertools
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


def averaged(given: Sequence[TokenProbabilities], top_k: int) -> TokenProbabilities:
    """The answers on which clients agree, and the mean probabilities at each of their places.

    An answer is written token by token. Each place has the mean over those whose own answer begins with the tokens so
    far, at the first place over all, and the likeliest of the tokens with which one of them goes on comes next (of
    equally likely ones that of the lowest id), until the answers of those who gave it end.

    A token that is not among a client's K likeliest counts as 0. Of the means the K largest are kept, and add up to 1.
    Sums are exact, so their order, which is that of client ids, decides nothing.

    Args:
        given: Of each client.
        top_k: The number K.
    """
    answers, tokens, probabilities = [], [], []
    for prompt in range(len(given[0].answers)):
        answer = list[int]()
        likely, chances = list[NDArray[np.uint32]](), list[NDArray[np.float16]]()
        alike = list(given)
        while alike:
            place = len(answer)
            found, sums = _sums([(one.tokens[prompt][place], one.probabilities[prompt][place]) for one in alike])
            best = np.lexsort((found, -sums))[:top_k]
            likely.append(found[best])
            chances.append((sums[best] / sums[best].sum()).astype(np.float16))
            means = dict(zip(found.tolist(), sums.tolist(), strict=True))
            written = {one.answers[prompt][place] for one in alike}
            answer.append(max(written, key=lambda token: (means.get(token, 0.0), -token)))
            alike = [one for one in alike if one.answers[prompt][place] == answer[-1]]
            alike = [one for one in alike if len(one.answers[prompt]) > place + 1]
        answers.append(tuple(answer))
        tokens.append(np.stack(likely))
        probabilities.append(np.stack(chances))
    return TokenProbabilities(tuple(answers), tuple(tokens), tuple(probabilities))


def _sums(
    given: Sequence[tuple[NDArray[np.uint32], NDArray[np.float16]]],
) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """The tokens that are given, ascending, and the sum of the probabilities of each."""
    tokens, owner = np.unique(np.concatenate([tokens for tokens, _ in given]), return_inverse=True)
    # Of half precision, thousands add up in double precision without rounding.
    weights = np.concatenate([chances for _, chances in given]).astype(np.float64)
    sums: NDArray[np.float64] = np.bincount(owner, weights=weights).astype(np.float64)
    return tokens, sums
