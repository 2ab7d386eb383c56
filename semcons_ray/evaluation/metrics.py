"""The metrics by which models are measured on the test set, and what they make of its items.

A metric is a mean over items, or the ratio of two sums over them: so it can be computed again for any choice of items,
and compared item by item between models. A new score of answers is a function in a file of its own and a line in
`parts.table`.

Legend: N items of the test set, of which the first A are answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from semcons_ray.errors import ConfigError
from semcons_ray.evaluation.scores import chrf, exact_match, numeric_match, rouge_l
from semcons_ray.parts import BUILT_IN, build, resolve

FloatArray = NDArray[np.float64]


class AnswerMetric(Protocol):
    """A metric of answers: a function, or an object with this method.

    Parameters of its class, or of the function besides these, are its options. It may say `label`, its name in tables,
    and `lower_is_better`.
    """

    def score(self, answer: str, reference: str) -> float:
        """What an answer scores against its reference; NaN if nothing, and the item does not count."""
        ...


def _nothing(answer: str, reference: str) -> float:
    return math.nan


@dataclass(frozen=True)
class Metric:
    """A metric, whose name is its column in metrics.parquet and in tables of items.

    Attributes:
        label: Its name in tables.
        score: See `AnswerMetric`; the default is of metrics that are computed from something else.
        total: The column of items that is summed up; "": the metric's own.
        over: The column by whose sum that is divided; "": the number of items that have a value.
        factor: What the ratio is multiplied by.
        lower_is_better: Whether a lower value is a better one.
        of_answers: Whether it is measured on generated answers.
    """

    label: str
    score: Callable[[str, str], float] = _nothing
    total: str = ""
    over: str = ""
    factor: float = 1.0
    lower_is_better: bool = False
    of_answers: bool = True


NLL = Metric("NLL", total="nats", over="num_tokens", lower_is_better=True, of_answers=False)
BITS_PER_BYTE = Metric(
    "bits/byte", total="nats", over="num_bytes", factor=1 / math.log(2), lower_is_better=True, of_answers=False
)
ROUGE_L = Metric("ROUGE-L", rouge_l)
SIMILARITY = Metric("similarity")
EXACT_MATCH = Metric("exact match", exact_match)
NUMERIC_MATCH = Metric("numeric match", numeric_match)
CHRF = Metric("chrF", chrf)
JUDGE = Metric("judged better")
MULTIPLE_CHOICE = Metric("accuracy", of_answers=False)

BESIDE = {
    "judge": {"judge_agreement": Metric("judge agrees with itself")},
    "multiple_choice": {"multiple_choice_norm": Metric("accuracy, by length", of_answers=False)},
}
"""Further metrics that come with one."""

ALWAYS = ("nll", "bits_per_byte")
"""What is measured whatever is asked for, since arms and clients are compared by it."""
OWN_METRICS = {f"own_{key}": key for key in ALWAYS}
"""Columns of metrics.parquet for clients' own test sets, where there are some, and what they measure on them."""


def metrics_of(settings: Iterable[str]) -> list[str]:
    """Keys of the metrics that `evaluation.metrics` asks for, and of those that are always measured."""
    wanted = dict.fromkeys([*ALWAYS, *settings])
    in_order = dict.fromkeys([*(key for key in BUILT_IN["metric"] if key in wanted), *wanted])
    return [key for name in in_order for key in (name, *BESIDE.get(name, ()))]


def find_metric(key: str) -> Metric:
    """What is known of a metric without its options, which it does not score with: of one that is not there any more,
    its name."""
    beside = [more[key] for more in BESIDE.values() if key in more]
    if beside:
        return beside[0]
    try:
        return _described(key, resolve("metric", key))
    except ConfigError:
        return Metric(key)


def make_metrics(settings: Iterable[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Metric]:
    """The metrics of `metrics_of`, by key, with their options.

    Raises:
        ConfigError: One refuses its options, or has the name of another in tables.
    """
    made, given = {}, options or {}
    for key in metrics_of(settings):
        made[key] = find_metric(key)
        if not _is_built_in(key):
            setting = f"evaluation.metric_options.{key}"
            made[key] = _described(key, build("metric", key, given.get(key, {}), setting=setting))
    by_label: dict[str, str] = {}
    for key, metric in made.items():
        if (other := by_label.setdefault(metric.label, key)) != key:
            raise ConfigError(f"evaluation.metrics {other} and {key} are both called {metric.label!r} in tables")
    return made


def _is_built_in(key: str) -> bool:
    return key in BUILT_IN["metric"] or any(key in more for more in BESIDE.values())


def _described(key: str, part: Any) -> Metric:
    """A metric of anybody's, which may be a function, a class or an object."""
    if isinstance(part, Metric):
        return part
    label = getattr(part, "label", "")
    return Metric(
        label=label if label and isinstance(label, str) else key.rpartition(":")[2],
        score=getattr(part, "score", part),
        lower_is_better=getattr(part, "lower_is_better", False) is True,
    )


def score_items(
    metrics: Mapping[str, Metric],
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
    """What each test item gave.

    Args:
        metrics: See `make_metrics`.
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

    Raises:
        ConfigError: A metric gave something that is no number.
    """
    count = len(references)
    likelihood = {"nats": nll, "num_tokens": num_tokens, "num_bytes": num_bytes}
    table = pd.DataFrame({"item": range(count)} | {key: values or math.nan for key, values in likelihood.items()})
    given = {"similarity": similarity}
    given["judge"], given["judge_agreement"] = ([one[place] for one in opinions] for place in (0, 1))
    if option_nll:
        given["multiple_choice"] = _accuracy(options, option_nll, references, lambda option: 1)
        given["multiple_choice_norm"] = _accuracy(options, option_nll, references, len)
    for key, metric in metrics.items():
        if not metric.over:
            values = given.get(key) or _scores(key, metric, answers, references)
            table[key] = [*values, *[math.nan] * (count - len(values))]
    if option_nll:
        table["option_nll"] = [list(one) for one in option_nll]
    table["answer"] = [*answers, *[None] * (count - len(answers))]
    return table


def _scores(key: str, metric: Metric, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    try:
        return [float(metric.score(answer, text)) for answer, text in zip(answers, references, strict=False)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"evaluation.metrics {key} gives no number: {error}") from error


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
    metric = find_metric(key)
    total = items[metric.total or key].to_numpy(dtype=np.float64)
    known = ~np.isnan(total)
    over = items[metric.over].to_numpy(dtype=np.float64) if metric.over else known.astype(np.float64)
    return np.where(known, total, 0.0), np.where(known, over, 0.0)


def value(items: pd.DataFrame, key: str) -> float:
    """A metric of items; NaN if none has a value."""
    total, over = sums(items, key)
    return find_metric(key).factor * float(total.sum() / over.sum()) if over.any() else math.nan
