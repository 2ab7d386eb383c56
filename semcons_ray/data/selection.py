"""Selection of the public prompts among candidates, and their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from semcons_ray.config import Selection
from semcons_ray.data.partition import Indices

MAX_K_CENTER_CANDIDATES = 10_000  # embedding all of a large data set would take longer than the run


def order_prompts(
    candidates: Indices,
    category: Indices,
    *,
    budget: int,
    selection: Selection,
    embed: Callable[[Indices], Tensor],
) -> Indices:
    """The first `budget` of `candidates`, shape (P,).

    - `random`: in the order given, which is shuffled.
    - `stratified`: one of each category in turn while it lasts, so that categories of any size have equally many.
    - `k_center`: farthest first. The first is the nearest to the mean embedding, each further one the farthest from all
      before it (Gonzalez 1985, a 2-approximation of the smallest covering radius; used for selecting training data by
      Sener & Savarese, arXiv:1708.00489). It considers `MAX_K_CENTER_CANDIDATES` candidates, or twice the budget if
      that is more.

    Args:
        candidates: Shuffled indices of examples, at least `budget`.
        category: Category of every example, as an integer.
        budget: Number of prompts P.
        selection: One of the above.
        embed: Gives embeddings (N, D) of the prompts of N indices; called for `k_center` only.
    """
    if selection == "random":
        return candidates[:budget]
    if selection == "stratified":
        keys = category[candidates]
        by_turn: Indices = candidates[np.lexsort((keys, _turn(keys)))]
        return by_turn[:budget]
    if selection == "k_center":
        pool = candidates[: max(MAX_K_CENTER_CANDIDATES, 2 * budget)]
        return pool[_farthest_first(embed(pool).cpu().double().numpy(), budget)]
    assert_never(selection)


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
