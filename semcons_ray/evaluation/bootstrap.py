"""Intervals by the bootstrap: how much a number depends on which test items happen to have been drawn.

Legend: B resamples, I items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

NUM_RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 4_000_000
"""Most counts that are drawn at once, so that memory does not grow with the items."""


class Interval(NamedTuple):
    """A number and the ends of its interval, which are NaN where it rests on a single item."""

    value: float
    low: float = math.nan
    high: float = math.nan


def bootstrap(statistic: Callable[[FloatArray], FloatArray], num_items: int) -> Interval:
    """The interval of a statistic by the percentile method (Efron & Tibshirani 1993, An Introduction to the Bootstrap,
    ch. 13): the middle `LEVEL` of its values over `NUM_RESAMPLES` resamples.

    A resample draws as many items as there are, with replacement. The draws depend on their number only.

    Args:
        statistic: Its values by how often each item was drawn, (B, I); shape (B,).
        num_items: Number of items.
    """
    (value,) = statistic(np.ones((1, num_items)))
    if num_items < 2:
        return Interval(float(value))
    random, values = np.random.default_rng(0), list[FloatArray]()
    block = max(1, _BLOCK // num_items)
    for size in [block] * (NUM_RESAMPLES // block) + [NUM_RESAMPLES % block]:
        drawn = random.integers(num_items, size=(size, num_items)) + num_items * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        values.append(statistic(counts.astype(np.float64)))
    resampled = np.concatenate(values)
    known = resampled[~np.isnan(resampled)]  # a resample may have none of the items of a run
    if not known.size:
        return Interval(float(value))
    with np.errstate(invalid="ignore"):  # a model that diverged is infinitely bad
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
