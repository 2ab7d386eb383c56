"""Whether a difference could be chance: a permutation test within groups, and a correction for several tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ENOUGH = 20
"""A test ends when this many draws were at least as extreme as what was observed."""

AT_ONCE = 500
"""Draws that are made at a time."""

ROUNDING = 1e-9
"""Sums of the same scores in another order differ by less than this."""


def permutation_test(
    scores: Floats, chosen: NDArray[np.bool_], groups: NDArray[np.int64], *, draws: int, random: np.random.Generator
) -> Floats:
    """Whether the chosen items score higher than others of their group, by drawing others in their place.

    In each draw as many items are chosen at random from each group as were chosen from it. A p-value is
    (1 + draws whose sum of scores is at least the observed one) / (1 + draws), which is valid for any number of draws.
    A test that plainly shows nothing ends early, at its `ENOUGH`-th such draw, with the p-value of Besag and Clifford
    (Biometrika 78, 1991): `ENOUGH` / draws made, which is as valid.

    Legend: S scores, N items.

    Args:
        scores: Scores of each item, (S, N); each row is a test of its own.
        chosen: Which items were chosen, (N,).
        groups: The group of each item, (N,).
        draws: Most draws to make.
        random: Random numbers.

    Returns:
        One-sided p-values, (S,).
    """
    observed = scores[:, chosen].sum(axis=1) - ROUNDING
    parts = [(np.flatnonzero(groups == group), int(chosen[groups == group].sum())) for group in np.unique(groups)]
    beyond, p_values = np.zeros(len(scores), dtype=int), np.full(len(scores), np.nan)
    for made in range(0, draws, AT_ONCE):
        count = min(AT_ONCE, draws - made)
        sums = np.zeros((len(scores), count))
        for members, size in parts:
            drawn = random.random((count, len(members))).argsort(axis=1)[:, :size]
            sums += scores[:, members][:, drawn].sum(axis=2)
        reached = beyond[:, None] + (sums >= observed[:, None]).cumsum(axis=1)
        for test in np.flatnonzero(np.isnan(p_values) & (reached[:, -1] >= ENOUGH)):
            p_values[test] = ENOUGH / (made + 1 + int(np.argmax(reached[test] >= ENOUGH)))
        beyond = reached[:, -1]
        if not np.isnan(p_values).any():
            break
    return np.where(np.isnan(p_values), (1 + beyond) / (1 + draws), p_values)


def holm(p_values: Floats) -> Floats:
    """P-values of several tests, adjusted so that the chance of any false alarm among them stays below the threshold.

    Whatever the tests have to do with one another (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted
