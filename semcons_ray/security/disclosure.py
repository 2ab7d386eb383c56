"""Do a client's answers hold its private examples, more than examples on which nobody has trained?

After Amin et al., "Phantoms and Disclosures" (arXiv:2606.16952): an answer may be like a private example because it was
copied, or because the client is good at such questions. The latter is as likely for examples that were held out, so
only an excess over these is a disclosure. The null hypothesis is that of learning nothing about single examples: within
a category, those on which the client trained and those held out could be exchanged. Of that paper are the comparison
and the three kinds of likeness; the test (a permutation test within categories), how scores are computed, and Holm's
correction over all clients and scores are our choice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from semcons_ray.data.examples import Example
from semcons_ray.messages import text_of
from semcons_ray.security.chance import Floats, holm, permutation_test

Embed = Callable[[Sequence[str]], Tensor]
"""Gives unit vectors of N texts, (N, D)."""

GRAM = 4
"""Words of an n-gram: shorter ones are shared by sentences that have nothing else in common."""

PER_TRAINED = 5
"""Held-out examples for each trained one that are enough: more would make the test hardly sharper, and take longer."""

SCORES = ("exact copy", "rare words", "meaning")

COLUMNS = ["client_id", "score", "num_trained", "num_held_out", "trained", "held_out", "effect", "p"]

DRAWS_PER_TEST = 1000
"""So many draws for each test, that even after Holm's correction a p-value of 0.001 can be reached."""


@dataclass(frozen=True)
class Shares:
    """What a client trained on, and what it is compared with.

    Attributes:
        trained: Private examples of the client.
        held_out: Examples on which it did not train, in the order in which they are to be preferred.
    """

    trained: Sequence[Example]
    held_out: Sequence[Example]

    def matched(self) -> Shares:
        """Only the categories in which there are examples of both kinds, of those held out at most `PER_TRAINED` for
        each that was trained on: the first."""
        room = Counter(one.category for one in self.trained for _ in range(PER_TRAINED))
        held_out = []
        for one in self.held_out:
            if room[one.category] > 0:
                room[one.category] -= 1
                held_out.append(one)
        both = {one.category for one in held_out}
        return Shares([one for one in self.trained if one.category in both], held_out)


def disclosure(
    shares: Mapping[int, Shares],
    answers: Mapping[int, Sequence[str]],
    public: Sequence[str],
    embed: Embed,
    random: np.random.Generator,
) -> pd.DataFrame:
    """The train-against-held-out test of every client that has answered.

    Args:
        shares: What clients trained on, and what was held out, by client id.
        answers: All answers that a client has sent, in all rounds, by client id.
        public: The public prompts, which answers may repeat without disclosing anything.
        embed: The embedder of the run.
        random: Random numbers of the permutations.

    Returns:
        A row for each client and score. Columns: client_id; score (see `likeness`); num_trained and num_held_out,
        examples in categories that have both; trained and held_out, mean scores, those held out weighted by category
        as those trained on; effect, their difference; p, one-sided; and p_adjusted, by Holm's method over all rows.
    """
    rows = []
    matched = {client: shares[client].matched() for client in answers}
    tested = {client: share for client, share in matched.items() if share.trained}
    for client, share in tested.items():
        pool = [*share.trained, *share.held_out]
        chosen = np.arange(len(pool)) < len(share.trained)
        _, groups = np.unique([one.category for one in pool], return_inverse=True)
        scores = likeness(pool, answers[client], public, embed)
        draws = DRAWS_PER_TEST * len(tested) * len(SCORES)
        p_values = permutation_test(scores, chosen, groups, draws=draws, random=random)
        weights = np.bincount(groups[chosen])[groups] / np.bincount(groups[~chosen])[groups]
        means = scores[:, chosen].mean(axis=1), np.average(scores[:, ~chosen], axis=1, weights=weights[~chosen])
        for score, trained, held_out, p in zip(SCORES, *means, p_values, strict=True):
            rows.append(
                {
                    "client_id": client,
                    "score": score,
                    "num_trained": len(share.trained),
                    "num_held_out": len(share.held_out),
                    "trained": trained,
                    "held_out": held_out,
                    "effect": trained - held_out,
                    "p": p,
                }
            )
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.assign(p_adjusted=holm(table["p"].to_numpy(float)))


def likeness(pool: Sequence[Example], answers: Sequence[str], public: Sequence[str], embed: Embed) -> Floats:
    """How much each example of a pool is like some answer, (3, N), each 0 to 1 (a cosine may be negative).

    An example is there as its response, and as its prompt with the response.

    - exact copy: 1 if an answer has the same words, divided by the number of examples in the pool that have them too.
      So a number that many examples share says little.
    - rare words: the share of its rare sequences of `GRAM` words that are in answers. Rare are those of no other
      example of the pool and of no public prompt; 0 if it has none.
    - meaning: the largest cosine to an answer.
    """
    texts = [(one.response, f"{text_of(one.prompt)} {one.response}") for one in pool]
    said = [words(answer) for answer in answers]
    whole = {" ".join(answer) for answer in said}
    spoken = {gram for answer in said for gram in _grams(answer)}
    plain = [[" ".join(words(text)) for text in both] for both in texts]
    sharing = Counter(text for both in plain for text in {*both})
    exact = [max((1 / sharing[text] for text in both if text and text in whole), default=0.0) for both in plain]
    grams = [{*_grams(words(both[1]))} for both in texts]
    asked = {gram for prompt in public for gram in _grams(words(prompt))}
    having = Counter(gram for own in grams for gram in own)
    rare = [{gram for gram in own if having[gram] == 1} - asked for own in grams]
    copied = [len(own & spoken) / len(own) if own else 0.0 for own in rare]
    distinct = sorted({answer for answer in answers if answer.strip()})
    meaning = np.zeros(len(pool))
    if distinct:
        vectors = embed(distinct)
        of_texts = embed([text for both in texts for text in both])
        nearest = (of_texts.double() @ vectors.double().T).amax(dim=1)
        meaning = nearest.reshape(-1, 2).amax(dim=1).numpy()
    return np.array([exact, copied, meaning])


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def _grams(sequence: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[start:] for start in range(GRAM)), strict=False)
