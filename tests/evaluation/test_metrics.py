import math

import pandas as pd
import pytest

from semcons_ray.config import DEFAULT_METRICS
from semcons_ray.errors import ConfigError
from semcons_ray.evaluation.metrics import find_metric, make_metrics, metrics_of, score_items, value
from semcons_ray.parts import BUILT_IN

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


def test_metrics_come_in_the_order_of_the_table_and_own_ones_last() -> None:
    assert metrics_of(BUILT_IN["metric"]) == [
        *("nll", "bits_per_byte", "rouge_l", "similarity", "exact_match", "numeric_match", "chrF"),
        *("judge", "judge_agreement", "multiple_choice", "multiple_choice_norm"),
    ]
    assert metrics_of(["own:b", "chrF", "own:a"]) == ["nll", "bits_per_byte", "chrF", "own:b", "own:a"]
    of_answers = {key for key in BUILT_IN["metric"] if find_metric(key).of_answers}
    assert of_answers == {"rouge_l", "similarity", "exact_match", "numeric_match", "chrF", "judge"}
    assert metrics_of(DEFAULT_METRICS) == list(DEFAULT_METRICS)


def test_losses_are_measured_in_any_case() -> None:
    assert metrics_of(["chrF"]) == ["nll", "bits_per_byte", "chrF"]
    assert metrics_of(["multiple_choice"])[2:] == ["multiple_choice", "multiple_choice_norm"]


def test_losses_are_ratios_of_sums_and_scores_are_means() -> None:
    items = score_items(make_metrics(["exact_match", "numeric_match", "similarity"]), **ITEMS, similarity=(0.5, 0.25))
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
    items = score_items(make_metrics(["rouge_l"]), **{**ITEMS, "answers": ()})
    assert math.isnan(value(items, "rouge_l"))


def test_the_likeliest_option_is_chosen_and_for_its_length_in_characters() -> None:
    items = score_items(make_metrics(["multiple_choice"]), **ITEMS, **OPTIONS)
    assert items["multiple_choice"].tolist() == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    # 6/3 nats a character for the mat, 8/16 for the rug.
    assert items["multiple_choice_norm"].tolist() == pytest.approx([1.0, math.nan, 0.0], nan_ok=True)
    assert (value(items, "multiple_choice"), value(items, "multiple_choice_norm")) == (1.0, 0.5)
    assert [list(one) for one in items["option_nll"]] == [[1.0, 2.0], [], [6.0, 8.0]]


def longer(answer: str, reference: str, *, by: int = 0) -> float:
    """Whether an answer is longer than its reference by more than so many characters."""
    return float(len(answer) - len(reference) > by)


class Different:
    """A metric with all that it may say of itself."""

    label = "differs"
    lower_is_better = True

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    def score(self, answer: str, reference: str) -> float:
        return self.weight * (answer != reference)


def words(answer: str, reference: str) -> str:
    return "many"


class Other(Different):
    label = "ROUGE-L"


LONGER, DIFFERENT = f"{__name__}:longer", f"{__name__}:Different"


def test_metrics_of_ones_own_are_functions_or_classes_with_options() -> None:
    options = {LONGER: {"by": 1}, DIFFERENT: {"weight": 3}}
    metrics = make_metrics([LONGER, DIFFERENT], options)
    items = score_items(metrics, **ITEMS)
    assert items[LONGER].tolist() == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)
    assert items[DIFFERENT].tolist() == pytest.approx([3.0, 3.0, math.nan], nan_ok=True)
    assert value(items, DIFFERENT) == 3.0
    assert (metrics[LONGER].label, metrics[LONGER].lower_is_better) == ("longer", False)
    assert (metrics[DIFFERENT].label, metrics[DIFFERENT].lower_is_better) == ("differs", True)
    assert make_metrics([LONGER])[LONGER].score("ab", "a") == 1.0


def test_a_metric_that_is_not_there_any_more_has_its_name() -> None:
    assert find_metric("gone:metric").label == "gone:metric"
    assert find_metric("multiple_choice_norm").label == "accuracy, by length"


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics rouge_l and .*:Other are both called 'ROUGE-L' in tables"):
        make_metrics(["rouge_l", f"{__name__}:Other"])


def test_what_is_no_number_is_refused() -> None:
    name = f"{__name__}:words"
    with pytest.raises(ConfigError, match=rf"^evaluation\.metrics {name} gives no number: could not convert string"):
        score_items(make_metrics([name]), **ITEMS)
