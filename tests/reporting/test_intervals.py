"""Intervals from items of made-up runs, whose sizes are known."""

import math

import numpy as np
import pandas as pd
import pytest

from semcons_ray.reporting.intervals import ARM_COLUMNS, arm_intervals, changes


def items(right: np.ndarray, *, questions: list[int] | None = None, answered: int | None = None) -> pd.DataFrame:
    """Accuracies of C clients on I questions, shape (I, C), with an NLL of 1 for right answers and 2 for others."""
    num_items, num_clients = right.shape
    frames = []
    for client in range(num_clients):
        scores = right[:, client].astype(float)
        values = np.where(np.arange(num_items) < (num_items if answered is None else answered), scores, np.nan)
        frames.append(
            pd.DataFrame(
                {
                    "client_id": client,
                    "question": questions or range(num_items),
                    "nats": 2.0 - scores,
                    "num_tokens": 1 + np.arange(num_items) % 3,
                    "num_bytes": 4,
                    "exact_match": values,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


RANDOM = np.random.default_rng(0)
BASE = RANDOM.random((300, 2)) < 0.4
BETTER = BASE | (RANDOM.random((300, 2)) < 0.1)


def test_a_mean_over_clients_and_its_change_by_hand() -> None:
    table = changes(items(BASE), items(BETTER), ["nll", "exact_match"])
    assert table.index.tolist() == ["nll", "exact_match"]
    row = table.loc["exact_match"]
    assert (row["label"], row["num_items"]) == ("exact match", 300)
    assert (row["base"], row["last"]) == pytest.approx((BASE.mean(), BETTER.mean()))
    assert row["change"] == pytest.approx(BETTER.mean() - BASE.mean())
    tokens = 1 + np.arange(300) % 3
    assert table.loc["nll", "base"] == pytest.approx(np.mean([(2.0 - BASE[:, c]).sum() / tokens.sum() for c in (0, 1)]))


def test_the_change_is_paired_and_so_narrower_than_either() -> None:
    row = changes(items(BASE), items(BETTER), ["exact_match"]).loc["exact_match"]
    difference = (BETTER.astype(float) - BASE).mean(axis=1)
    assert row["smallest"] == pytest.approx(1.96 * difference.std() / math.sqrt(300), rel=0.06)
    assert row["smallest"] == pytest.approx((row["change_high"] - row["change_low"]) / 2)
    unpaired = math.hypot(row["base_high"] - row["base_low"], row["last_high"] - row["last_low"]) / 2
    assert row["smallest"] < unpaired / 2


def test_clients_that_agree_do_not_make_more_of_the_same_questions() -> None:
    alike = np.repeat(BASE[:, :1], 8, axis=1)
    one, eight = (
        changes(items(right), items(right), ["exact_match"]).loc["exact_match"] for right in (BASE[:, :1], alike)
    )
    assert one[["base_low", "base_high"]].tolist() == pytest.approx(eight[["base_low", "base_high"]].tolist())
    assert eight["smallest"] == 0.0


def test_questions_without_an_answer_are_not_drawn() -> None:
    row = changes(items(BASE, answered=50), items(BETTER, answered=50), ["exact_match"]).loc["exact_match"]
    assert row["num_items"] == 50
    assert row["base"] == pytest.approx(BASE[:50].mean())
    assert changes(items(BASE, answered=0), items(BETTER, answered=0), ["exact_match"]).empty
    assert changes(items(BASE).iloc[:0], items(BETTER).iloc[:0], ["exact_match"]).empty


def test_a_change_is_that_of_what_both_models_of_a_client_answered() -> None:
    base, last = items(BASE), items(BETTER)
    base.loc[base["question"] == 0, "exact_match"] = math.nan
    last.loc[last["question"] == 1, "exact_match"] = math.nan  # as many as before, but others
    last.loc[(last["client_id"] == 1) & (last["question"] < 100), "exact_match"] = math.nan
    row = changes(base, last, ["exact_match"]).loc["exact_match"]
    assert row["num_items"] == 298
    assert row["base"] == pytest.approx((BASE[2:, 0].mean() + BASE[100:, 1].mean()) / 2)
    assert row["change"] == pytest.approx(row["last"] - row["base"])
    assert row["last"] == pytest.approx((BETTER[2:, 0].mean() + BETTER[100:, 1].mean()) / 2)
    last.loc[last["client_id"] == 1, "exact_match"] = math.nan
    assert changes(base, last, ["exact_match"]).loc["exact_match", "base"] == pytest.approx(BASE[2:, 0].mean())


def test_a_client_without_a_base_is_left_out() -> None:
    last = items(BETTER)
    row = changes(items(BASE[:, :1]), last, ["exact_match"]).loc["exact_match"]
    assert row["last"] == pytest.approx(BETTER[:, 0].mean())


def test_arms_are_paired_by_seed_and_question() -> None:
    runs = {
        (arm, seed): items(right[seed * 100 : (seed + 1) * 100], questions=[*range(seed * 100, (seed + 1) * 100)])
        for arm, right in (("first", BASE), ("other", BETTER))
        for seed in range(3)
    }
    table = arm_intervals(runs, ["exact_match"], "first").set_index("arm")
    assert table["num_items"].tolist() == [300, 300]
    assert table.loc["other", "value"] == pytest.approx(BETTER.mean())
    assert table.loc["other", "difference"] == pytest.approx(BETTER.mean() - BASE.mean())
    assert table.loc["other", "difference_low"] > 0
    width = table.loc["other", "difference_high"] - table.loc["other", "difference_low"]
    assert width < (table.loc["other", "value_high"] - table.loc["other", "value_low"]) * 0.7
    assert width / 2 == pytest.approx(
        1.96 * (BETTER.astype(float) - BASE).mean(axis=1).std() / math.sqrt(300), rel=0.06
    )
    assert math.isnan(table.loc["first", "difference"])


def test_questions_that_seeds_share_are_drawn_for_all_of_them() -> None:
    def width(shared: bool) -> float:
        runs = {
            ("a", seed): items(
                BASE[:, :1], questions=[*range(300)] if shared else [*range(300 * seed, 300 * seed + 300)]
            )
            for seed in range(4)
        }
        row = arm_intervals(runs, ["exact_match"], "a").iloc[0]
        return float(row["value_high"] - row["value_low"])

    assert width(True) == pytest.approx(2 * width(False), rel=0.15)  # four times the questions, half the width


def test_over_seeds_there_is_a_t_interval() -> None:
    rights = [0.2, 0.3, 0.7]
    runs = {("a", seed): items(RANDOM.random((300, 1)) < share) for seed, share in enumerate(rights)}
    row = arm_intervals(runs, ["exact_match"], "a").iloc[0]
    means = [items["exact_match"].mean() for items in runs.values()]
    assert row["value_half_width"] == pytest.approx(4.302652729911275 * np.std(means, ddof=1) / math.sqrt(3))
    one = arm_intervals({("a", 0): runs["a", 0]}, ["exact_match"], "a").iloc[0]
    assert math.isnan(one["value_half_width"])


def test_a_metric_that_an_arm_was_not_measured_by_is_left_out_of_it() -> None:
    runs = {("a", 0): items(BASE), ("b", 0): items(BASE).drop(columns="exact_match")}
    table = arm_intervals(runs, ["nll", "exact_match"], "a")
    assert list(zip(table["arm"], table["metric"], strict=True)) == [("a", "nll"), ("b", "nll"), ("a", "exact_match")]
    assert list(arm_intervals({}, ["nll"], "a").columns) == list(ARM_COLUMNS)


def test_arms_are_compared_on_the_questions_that_both_answered() -> None:
    runs = {("a", 0): items(BASE, answered=100), ("b", 0): items(BETTER, answered=50), ("c", 1): items(BETTER)}
    table = arm_intervals(runs, ["exact_match"], "a").set_index("arm")
    assert table.loc["b", "difference"] == pytest.approx(BETTER[:50].mean() - BASE[:50].mean())
    assert table["num_items"].tolist() == [100, 50, 300]
    assert math.isnan(table.loc["c", "difference"])  # of another seed
