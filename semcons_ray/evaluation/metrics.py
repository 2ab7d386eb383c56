"""The metrics by which models are measured on the test set, and what they make of its items.

A metric is a mean over items, or the ratio of two sums over them: so it can be computed again for any choice of items,
and compared item by item between models. A new score of answers is a function in a file of its own, a line in
`METRICS`, and its name in `MetricName` of config/sections.py.

Legend: N items of the test set, of which the first A are answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from semcons_ray.evaluation.scores import chrf, exact_match, numeric_match, rouge_l

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A metric, whose key in `METRICS` is its column in metrics.parquet and in tables of items.

    Attributes:
        label: Its name in tables.
        score: What an answer scores against its reference, in this order, NaN if nothing; None: it is computed from
            something else than the text of answers.
        total: The column of items that is summed up; "": the metric's own.
        over: The column by whose sum that is divided; "": the number of items that have a value.
        factor: What the ratio is multiplied by.
        setting: Its name in `evaluation.metrics`; "": the same as its key.
        lower_is_better: Whether a lower value is a better one.
    """

    label: str
    score: Callable[[str, str], float] | None = None
    total: str = ""
    over: str = ""
    factor: float = 1.0
    setting: str = ""
    lower_is_better: bool = False


METRICS: dict[str, Metric] = {
    "nll": Metric("NLL", total="nats", over="num_tokens", lower_is_better=True),
    "bits_per_byte": Metric("bits/byte", total="nats", over="num_bytes", factor=1 / math.log(2), lower_is_better=True),
    "rouge_l": Metric("ROUGE-L", rouge_l),
    "similarity": Metric("similarity"),
    "exact_match": Metric("exact match", exact_match),
    "numeric_match": Metric("numeric match", numeric_match),
    "chrF": Metric("chrF", chrf),
    "judge": Metric("judged better"),
    "judge_agreement": Metric("judge agrees with itself", setting="judge"),
    "multiple_choice": Metric("accuracy"),
    "multiple_choice_norm": Metric("accuracy, by length", setting="multiple_choice"),
}
ALWAYS = ("nll", "bits_per_byte")
"""What is measured whatever is asked for, since arms and clients are compared by it."""
OWN_METRICS = {f"own_{key}": key for key in ALWAYS}
"""Columns of metrics.parquet for clients' own test sets, where there are some, and what they measure on them."""


def metrics_of(settings: Iterable[str]) -> list[str]:
    """Keys of the metrics that `evaluation.metrics` asks for, and of those that are always measured."""
    wanted = {*ALWAYS, *settings}
    return [key for key, metric in METRICS.items() if (metric.setting or key) in wanted]


def score_items(
    settings: Iterable[str],
    *,
    nll: Sequence[float],
    num_tokens: Sequence[int],
    num_bytes: Sequence[int],
    answers: Sequence[str],
    references: Sequence[str],
    similarity: Sequence[float] = (),
    opinions: Sequence[tuple[float, float]] = (),
    options: Sequence[Sequence[str]] = (),
    option_nll: Sequence[Sequence[float]] = (),
) -> pd.DataFrame:
    """What each test item gave, for the metrics that `settings` ask for.

    Args:
        settings: See `metrics_of`.
        nll: NLL (nats) of each reference answer, (N,); empty, as the next two, if it is not known.
        num_tokens: Tokens of each reference answer, (N,).
        num_bytes: Bytes of each reference answer, (N,).
        answers: Answers to the first items, (A,).
        references: Reference answers, (N,).
        similarity: Cosine of each answer to its reference, (A,); empty if it isn't asked for.
        opinions: The judge's score of each answer, and whether both orders agreed, (A,); empty if it isn't asked for.
        options: Options of each item, (N,); empty if they are not scored.
        option_nll: NLL (nats) of each of them.

    Returns:
        Columns item (0 to N-1); nats, num_tokens, num_bytes, NaN where likelihood is not known; one for each metric
        that is not a ratio of these, NaN where an item has none; option_nll, if options are scored; and answer, None
        where there is none.
    """
    count = len(references)
    likelihood = {"nats": nll, "num_tokens": num_tokens, "num_bytes": num_bytes}
    table = pd.DataFrame({"item": range(count)} | {key: values or math.nan for key, values in likelihood.items()})
    given = {"similarity": similarity}
    given["judge"], given["judge_agreement"] = ([one[place] for one in opinions] for place in (0, 1))
    if option_nll:
        given["multiple_choice"] = _accuracy(options, option_nll, references, lambda option: 1)
        given["multiple_choice_norm"] = _accuracy(options, option_nll, references, len)
    for key in metrics_of(settings):
        metric = METRICS[key]
        values = given.get(key, ())
        if metric.score is not None:
            values = [metric.score(answer, text) for answer, text in zip(answers, references, strict=False)]
        if not metric.over:
            table[key] = [*values, *[math.nan] * (count - len(values))]
    if option_nll:
        table["option_nll"] = [list(one) for one in option_nll]
    table["answer"] = [*answers, *[None] * (count - len(answers))]
    return table


def _accuracy(
    options: Sequence[Sequence[str]],
    nll: Sequence[Sequence[float]],
    references: Sequence[str],
    length: Callable[[str], int],
) -> list[float]:
    """Whether the option of least NLL for its length is the reference; NaN where there are no options.

    lm-eval's `acc`, where all lengths are 1; its `acc_norm` has them in characters.
    """
    scores = []
    for texts, values, reference in zip(options, nll, references, strict=True):
        best = int(np.argmin(np.array(values) / [length(text) for text in texts])) if texts else None
        scores.append(math.nan if best is None else float(texts[best] == reference))
    return scores


def sums(items: pd.DataFrame, key: str) -> tuple[FloatArray, FloatArray]:
    """Numerator and denominator of a metric for each row: the metric is the ratio of their sums, times its factor."""
    metric = METRICS[key]
    total = items[metric.total or key].to_numpy(dtype=np.float64)
    known = ~np.isnan(total)
    over = items[metric.over].to_numpy(dtype=np.float64) if metric.over else known.astype(np.float64)
    return np.where(known, total, 0.0), np.where(known, over, 0.0)


def value(items: pd.DataFrame, key: str) -> float:
    """A metric of items; NaN if none has a value."""
    total, over = sums(items, key)
    return METRICS[key].factor * float(total.sum() / over.sum()) if over.any() else math.nan
