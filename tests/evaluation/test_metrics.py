import math
from typing import get_args

import pandas as pd
import pytest

from semcons_ray.config import DEFAULT_METRICS, AnswerMetricName, MetricName
from semcons_ray.evaluation.metrics import METRICS, metrics_of, score_items, value

ITEMS = {
    "nll": (2.0, 4.0, 3.0),
    "num_tokens": (1, 3, 2),
    "num_bytes": (4, 8, 6),
    "answers": ("the cat", "5"),
    "references": ("a cat", "#### 3", "mat"),
}
OPTIONS = {
    "options": [("a cat", "a dog"), (), ("mat", "rug that is long")],
    "option_nll": [(1.0, 2.0), (), (6.0, 8.0)],
}


def test_every_name_of_the_settings_is_a_metric_and_the_other_way_round() -> None:
    names = {name for kind in get_args(MetricName) for name in ([kind] if isinstance(kind, str) else get_args(kind))}
    assert {metric.setting or key for key, metric in METRICS.items()} == names
    scored = {key for key, metric in METRICS.items() if metric.score is not None}
    assert scored | {"similarity", "judge"} == set(get_args(AnswerMetricName))
    assert metrics_of(DEFAULT_METRICS) == list(DEFAULT_METRICS)


def test_losses_are_measured_in_any_case() -> None:
    assert metrics_of(["chrF"]) == ["nll", "bits_per_byte", "chrF"]
    assert metrics_of(["multiple_choice"])[2:] == ["multiple_choice", "multiple_choice_norm"]


def test_losses_are_ratios_of_sums_and_scores_are_means() -> None:
    items = score_items(["exact_match", "numeric_match", "similarity"], **ITEMS, similarity=(0.5, 0.25))
    assert items["item"].tolist() == [0, 1, 2]
    assert value(items, "nll") == pytest.approx(9 / 6)
    assert value(items, "bits_per_byte") == pytest.approx(9 / math.log(2) / 18)
    assert items["exact_match"].tolist() == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)
    assert value(items, "exact_match") == 0.5
    assert value(items, "similarity") == 0.375
    # The first reference has no number, the third no answer.
    assert items["numeric_match"].tolist() == pytest.approx([math.nan, 0.0, math.nan], nan_ok=True)
    assert value(items, "numeric_match") == 0.0
    assert items["answer"].tolist()[:2] == ["the cat", "5"]
    assert pd.isna(items["answer"][2])
    assert {"rouge_l", "chrF", "option_nll"}.isdisjoint(items)


def test_what_nothing_was_measured_of_is_nan() -> None:
    items = score_items(["rouge_l"], **{**ITEMS, "answers": ()})
    assert math.isnan(value(items, "rouge_l"))


def test_the_likeliest_option_is_chosen_and_for_its_length_in_characters() -> None:
    items = score_items(["multiple_choice"], **ITEMS, **OPTIONS)
    assert items["multiple_choice"].tolist() == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    # 6/3 nats a character for the mat, 8/16 for the rug.
    assert items["multiple_choice_norm"].tolist() == pytest.approx([1.0, math.nan, 0.0], nan_ok=True)
    assert (value(items, "multiple_choice"), value(items, "multiple_choice_norm")) == (1.0, 0.5)
    assert [list(one) for one in items["option_nll"]] == [[1.0, 2.0], [], [6.0, 8.0]]
