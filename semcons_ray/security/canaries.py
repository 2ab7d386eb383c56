"""What tells whether a canary was put among a client's examples: its answers, the pseudo-labels, models.

Measured as in Meeus et al., "The Canary's Echo" (arXiv:2502.14921), on canaries whose coins are known: how likely a
2-gram model of the texts finds a canary, and how likely a language model finds it. Exposure is that of Carlini et al.
(arXiv:1802.08232), with the canaries that were not inserted in the place of all possible ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from semcons_ray.data.canaries import Canary
from semcons_ray.security.chance import Floats, holm, permutation_test
from semcons_ray.security.disclosure import words

OWN_MODEL = "own model"
"""What a client keeps to itself: that it tells of a canary is no leak, and shows what a leak could tell."""

FALSE_POSITIVES = 0.01

DRAWS = 100_000


def recovered(
    canaries: Sequence[Canary], scores: Mapping[str, Floats], random: np.random.Generator
) -> pd.DataFrame:
    """How well scores tell the canaries that were inserted from the others.

    Args:
        canaries: All canaries.
        scores: By where one looks, a score of each canary, (N,): the higher, the likelier it was inserted; NaN: it
            cannot be seen there.
        random: Random numbers of the permutations.

    Returns:
        A row for each place and kind of canaries, where there are canaries of both coins. Columns: place; kind;
        num_inserted and num_others; auc, the chance that an inserted one scores higher than another, one half if
        nothing is told; tpr, the share of inserted ones that are found while at most 1% of the others are taken for
        such, which are none if there are fewer than 100; exposure (bits), the mean of log2 of the number of others + 1
        over the rank among them, and exposure_by_chance; p, by permutation of the coins; and p_adjusted, by Holm's
        method over all places but a client's own model.
    """
    inserted = np.array([canary.inserted for canary in canaries])
    kinds = np.array([canary.kind for canary in canaries])
    rows = []
    for place, of_place in scores.items():
        for kind in dict.fromkeys(kinds.tolist()):
            seen = (kinds == kind) & ~np.isnan(of_place)
            coin, score = inserted[seen], of_place[seen]
            if coin.any() and not coin.all():
                rows.append({"place": place, "kind": kind, **_told(score, coin), "p": _p_value(score, coin, random)})
    table = pd.DataFrame(rows, columns=COLUMNS)
    p_values = table["p"].to_numpy(float)
    leaks = (table["place"] != OWN_MODEL).to_numpy()
    adjusted = np.full(len(table), np.nan)
    adjusted[leaks] = holm(p_values[leaks])
    return table.assign(p_adjusted=adjusted)


COLUMNS = ["place", "kind", "num_inserted", "num_others", "auc", "tpr", "exposure", "exposure_by_chance", "p"]


def _told(score: Floats, coin: NDArray[np.bool_]) -> dict[str, float]:
    inside, others = score[coin], np.sort(score[~coin])
    above = len(others) - np.searchsorted(others, inside, side="right")
    ties = len(others) - above - np.searchsorted(others, inside, side="left")
    ranks = 1 + above + ties / 2
    possible = np.arange(1, len(others) + 2)
    threshold = others[len(others) - 1 - int(FALSE_POSITIVES * len(others))]
    return {
        "num_inserted": len(inside),
        "num_others": len(others),
        "auc": float(1 - (ranks - 1).mean() / len(others)),
        "tpr": float((inside > threshold).mean()),
        "exposure": float(np.log2((len(others) + 1) / ranks).mean()),
        "exposure_by_chance": float(np.log2((len(others) + 1) / possible).mean()),
    }


def _p_value(score: Floats, coin: NDArray[np.bool_], random: np.random.Generator) -> float:
    """Of the sum of ranks of the inserted ones, had other canaries been inserted."""
    ranks = rankdata(score)[None]
    (p,) = permutation_test(ranks, coin, np.zeros(len(coin), dtype=np.int64), draws=DRAWS, random=random)
    return float(p)


class Bigrams:
    """A 2-gram model of texts, with one added to every count (Laplace).

    Args:
        texts: The texts.
        vocabulary: Words that the model knows besides those of the texts.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Sequence[str]) -> None:
        sequences = [["", *words(text)] for text in texts]
        self._pairs = Counter(pair for sequence in sequences for pair in pairwise(sequence))
        self._firsts = Counter(word for sequence in sequences for word in sequence[:-1])
        self._size = len({word for sequence in sequences for word in sequence[1:]} | {*vocabulary})

    def score(self, text: str) -> float:
        """Mean log-likelihood (nats a word) of a text of at least one word."""
        pairs = [*pairwise(["", *words(text)])]
        chances = [(self._pairs[pair] + 1) / (self._firsts[pair[0]] + self._size) for pair in pairs]
        return float(np.log(chances).mean())


def in_texts(canaries: Sequence[Canary], texts: Mapping[int, Sequence[str]]) -> Floats:
    """Scores of canaries by texts that are there for each client, (N,); NaN for a client without texts."""
    vocabulary = [word for canary in canaries for word in words(canary.response)]
    models = {client: Bigrams(own, vocabulary) for client, own in texts.items()}
    return np.array(
        [
            models[canary.client_id].score(canary.response) if canary.client_id in models else np.nan
            for canary in canaries
        ]
    )


def in_models(canaries: Sequence[Canary], nll: Mapping[int, Floats], *, same: bool) -> dict[str, Floats]:
    """Scores of canaries by clients' models.

    Args:
        canaries: All canaries.
        nll: By client, how much lower its model makes the negative log-likelihood (nats a token) of each response than
            the base model does, (N,).
        same: Whether all models are one and the same.

    Returns:
        By place, the scores, (N,): of a client's own model and the mean of the others', or of the shared model.
    """
    if same:
        return {"shared model": next(iter(nll.values()))}
    owner = np.array([canary.client_id for canary in canaries])
    gains = np.array([*nll.values()])
    owned = owner[None] == np.array([*nll])[:, None]

    def mean(which: NDArray[np.bool_]) -> Floats:
        count = which.sum(axis=0)
        return np.where(count > 0, np.where(which, gains, 0).sum(axis=0) / np.maximum(count, 1), np.nan)

    return {OWN_MODEL: mean(owned), "other clients' models": mean(~owned)}
