"""Selection of the public prompts among candidates, and their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from semcons_ray.data.examples import Example
from semcons_ray.data.partition import Indices
from semcons_ray.errors import ConfigError
from semcons_ray.messages import text_of
from semcons_ray.parts import build

MAX_K_CENTER_CANDIDATES = 10_000  # embedding all of a large data set would take longer than the run

Embed = Callable[[Sequence[str]], Tensor]
"""Gives unit vectors of N texts, (N, D)."""


class Selection(Protocol):
    """How public prompts are chosen: a function, or a class whose objects can be called as one.

    Parameters of the class, or of the function besides these, are its options.
    """

    def __call__(self, candidates: Sequence[Example], budget: int, embed: Embed) -> Sequence[int] | Indices:
        """Places in `candidates` of the prompts in their order, (P,), all different.

        Args:
            candidates: Examples that may be taken, shuffled, at least `budget`; what answers them no client sees.
            budget: Number of prompts P.
            embed: Gives embeddings of texts, by the server's embedder, which is loaded when it is first called.
        """
        ...


def order_prompts(
    candidates: Sequence[Example], *, budget: int, selection: str, options: Mapping[str, Any], embed: Embed
) -> Indices:
    """Places of the prompts in `candidates`, (P,). See `Selection` for arguments.

    Args:
        selection: Its name.
        options: Its options.

    Raises:
        ConfigError: It refuses its options, or what it returned is no choice of `budget` candidates.
    """
    choose: Selection = build("selection", selection, options, setting="prompts.selection_options")
    try:
        chosen = np.asarray(choose(candidates, budget, embed), dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"prompts.selection {selection} gave no list of places: {error}") from error
    is_whole = chosen.shape == (budget,) and len(np.unique(chosen)) == budget
    if not is_whole or chosen.min() < 0 or chosen.max() >= len(candidates):
        raise ConfigError(
            f"prompts.selection {selection} gave {chosen.size} places, not prompts.budget {budget} different ones of "
            f"0 to {len(candidates) - 1}"
        )
    return chosen


def first(candidates: Sequence[Example], budget: int, embed: Embed) -> Indices:
    """At random: in the order given, which is shuffled."""
    return np.arange(budget)


def stratified(candidates: Sequence[Example], budget: int, embed: Embed) -> Indices:
    """One of each category in turn while it lasts, so that categories of any size have equally many."""
    code = {name: place for place, name in enumerate(sorted({example.category for example in candidates}))}
    keys = np.array([code[example.category] for example in candidates])
    by_turn: Indices = np.lexsort((keys, _turn(keys)))
    return by_turn[:budget]


def k_center(candidates: Sequence[Example], budget: int, embed: Embed) -> Indices:
    """Farthest first: the first is the nearest to the mean embedding, each further one the farthest from all before it.

    Gonzalez 1985, a 2-approximation of the smallest covering radius; used for selecting training data by Sener &
    Savarese, arXiv:1708.00489. It considers `MAX_K_CENTER_CANDIDATES` candidates, or twice the budget if that is more.
    """
    pool = candidates[: max(MAX_K_CENTER_CANDIDATES, 2 * budget)]
    vectors = embed([text_of(example.prompt) for example in pool])
    return _farthest_first(vectors.cpu().double().numpy(), budget)


def proportional(order: Indices, category: Indices) -> Indices:
    """`order` rearranged so that its first n, for any n, have the category mix of all, up to rounding."""
    keys = category[order]
    place = (_turn(keys) + 0.5) / np.bincount(keys)[keys]
    rearranged: Indices = order[np.lexsort((keys, place))]
    return rearranged


def _turn(keys: Indices) -> Indices:
    """For each key, how many equal keys stand before it, (N,)."""
    together = np.argsort(keys, kind="stable")
    size = np.bincount(keys)
    turn = np.empty(len(keys), dtype=np.int64)
    turn[together] = np.arange(len(keys)) - np.repeat(np.cumsum(size) - size, size)
    return turn


def _farthest_first(vectors: NDArray[np.float64], count: int) -> Indices:
    squared = np.einsum("nd,nd->n", vectors, vectors)

    def distance(centre: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = squared - 2 * (vectors @ centre) + centre @ centre
        return result

    chosen = [int(np.argmin(distance(vectors.mean(axis=0))))]
    nearest = distance(vectors[chosen[0]])
    while len(chosen) < count:
        nearest[chosen[-1]] = -np.inf  # so that no prompt comes twice, even where embeddings coincide
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, distance(vectors[chosen[-1]]))
    return np.array(chosen, dtype=np.int64)
