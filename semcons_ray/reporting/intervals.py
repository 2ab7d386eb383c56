"""Metrics of models with their intervals, from what each test item gave.

All clients of a run, and all arms with the same seed, are measured on the same test items. So what is drawn again is an
item with all that was made of it: by every client, and by both models of a difference. An item that is in the test sets
of several seeds is drawn for all of them. Such an interval says what other test items would have changed, and not what
another training would; for that, several seeds have an interval of their own.

Legend: B resamples, I items, S seeds, C clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from semcons_ray.evaluation.bootstrap import FloatArray, bootstrap
from semcons_ray.evaluation.metrics import find_metric, sums

INTERVALS = ("base", "last", "change")
ARM_COLUMNS = (
    *("arm", "metric", "label", "num_items"),
    *("value", "value_low", "value_high", "value_half_width"),
    *("difference", "difference_low", "difference_high", "difference_half_width"),
)


@dataclass(frozen=True, eq=False)
class _Measured:
    """A metric of a run's clients, as sums whose ratio it is.

    Attributes:
        total: Numerators, (I, C).
        over: Denominators, (I, C).
        questions: What each item is called in all runs, ascending, (I,).
    """

    total: FloatArray
    over: FloatArray
    questions: NDArray[np.int64]

    @classmethod
    def of(cls, items: pd.DataFrame, key: str) -> _Measured:
        """The metric `key` of a table of items, without items that have no value."""
        total, over = sums(items, key)
        known = items[["client_id", "question"]].assign(total=find_metric(key).factor * total, over=over)[over > 0]
        wide = [known.pivot(index="question", columns="client_id", values=name) for name in ("total", "over")]
        summed, counted = (table.fillna(0).to_numpy(dtype=np.float64) for table in wide)
        return cls(summed, counted, wide[0].index.to_numpy(dtype=np.int64))

    def at(self, questions: NDArray[np.int64]) -> _Measured:
        """The same of some of its questions."""
        rows = np.searchsorted(self.questions, questions)
        return _Measured(self.total[rows], self.over[rows], questions)

    def mean(self, counts: FloatArray) -> FloatArray:
        """Mean over clients, by how often each item counts, (B, I); shape (B,)."""
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where no item of this run was drawn
            means: FloatArray = (counts @ self.total / (counts @ self.over)).mean(axis=1)
        return means


def changes(base: pd.DataFrame, last: pd.DataFrame, keys: Iterable[str]) -> pd.DataFrame:
    """Means over clients of the base models and of the clients' last ones, and the paired difference.

    Args:
        base: Items of the base model of each client.
        last: Items of each client's last measurement.
        keys: Keys of metrics.

    Returns:
        Index metric, those that no item has a value of left out; columns label, num_items, base, last and change, each
        with a low and a high end (base_low ...), and smallest: half of the interval of the change. A smaller change
        could not have been told from none. All are of what both models of a client have a value of.
    """
    rows = {}
    for key in keys:
        before, after = (_Measured.of(items, key) for items in _known_in_both(base, last, key))
        if len(after.questions):
            change = _known("change", [after], [before])
            smallest = (change["change_high"] - change["change_low"]) / 2
            rows[key] = {"label": find_metric(key).label, "num_items": len(after.questions), "smallest": smallest}
            rows[key] |= _known("base", [before]) | _known("last", [after]) | change
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def arm_intervals(runs: Mapping[tuple[str, int], pd.DataFrame], keys: Sequence[str], first: str) -> pd.DataFrame:
    """Means over clients and seeds of each arm, and the differences to the first arm, paired by seed and item.

    Args:
        runs: Items of the last measurements, by arm and seed.
        keys: Keys of metrics.
        first: The arm with which others are compared.

    Returns:
        Columns `ARM_COLUMNS`: num_items counts different items, of all seeds; low and high are the ends of the interval
        over items; half_width is that of the 95% t-interval over seeds, NaN for one seed. The difference is NaN for the
        first arm, and where no seed is shared with it.
    """
    rows = []
    for key in keys:
        with_key = {run: items for run, items in runs.items() if (find_metric(key).total or key) in items}
        measured = {run: _Measured.of(items, key) for run, items in with_key.items()}
        for arm in dict.fromkeys(arm for arm, _ in runs):
            of_arm = {seed: one for (name, seed), one in measured.items() if name == arm and len(one.questions)}
            if not of_arm:
                continue
            num_items = len(np.unique(np.concatenate([one.questions for one in of_arm.values()])))
            row = {"arm": arm, "metric": key, "label": find_metric(key).label, "num_items": num_items}
            row |= _known("value", [*of_arm.values()])
            if arm != first:
                row |= _difference((one, measured.get((first, seed))) for seed, one in of_arm.items())
            rows.append(row)
    return pd.DataFrame(rows, columns=list(ARM_COLUMNS))


def mean_and_half_width(values: FloatArray) -> tuple[float, float]:
    """Mean of independent values and the half width of its 95% t-interval, which is NaN for fewer than two."""
    count = len(values)
    if count < 2:
        return float(values[0]) if count else math.nan, math.nan
    with np.errstate(invalid="ignore"):  # infinite values have a mean, and no spread
        spread = float(np.std(values, ddof=1))
        return float(np.mean(values)), float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count)


def _known_in_both(base: pd.DataFrame, last: pd.DataFrame, key: str) -> list[pd.DataFrame]:
    """The items of which both of a client's models have a value."""
    places = [pd.MultiIndex.from_frame(items[["client_id", "question"]]) for items in (base, last)]
    known = [place[sums(items, key)[1] > 0] for place, items in zip(places, (base, last), strict=True)]
    both = known[0].intersection(known[1])
    return [items[place.isin(both)] for place, items in zip(places, (base, last), strict=True)]


def _difference(pairs: Iterable[tuple[_Measured, _Measured | None]]) -> dict[str, float]:
    """The difference of pairs of models, one for each seed, on the questions that both were asked."""
    shared = [(one, other, np.intersect1d(one.questions, other.questions)) for one, other in pairs if other]
    paired = [(one.at(both), other.at(both)) for one, other, both in shared if both.size]
    return _known("difference", *zip(*paired, strict=True)) if paired else {}


def _known(name: str, models: Sequence[_Measured], others: Sequence[_Measured] = ()) -> dict[str, float]:
    """The mean over seeds of a metric with its intervals, less that of `others` if given, which have the same items."""
    questions, places = np.unique(np.concatenate([one.questions for one in models]), return_inverse=True)
    of_seed = np.split(places, np.cumsum([len(one.questions) for one in models])[:-1])

    def by_seed(counts: FloatArray) -> FloatArray:
        means = [one.mean(counts[:, place]) for one, place in zip(models, of_seed, strict=True)]
        less = [one.mean(counts[:, place]) for one, place in zip(others, of_seed, strict=False)] or 0.0
        return np.asarray(np.stack(means, axis=1) - np.transpose(less))

    value, low, high = bootstrap(lambda counts: by_seed(counts).mean(axis=1), len(questions))
    _, half_width = mean_and_half_width(by_seed(np.ones((1, len(questions))))[0])
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_half_width": half_width}
