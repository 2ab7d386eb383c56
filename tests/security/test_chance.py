from itertools import combinations

import numpy as np
import pytest

from semcons_ray.security.chance import ENOUGH, holm, permutation_test


def one_group(scores: np.ndarray, chosen: np.ndarray, draws: int = 20_000, seed: int = 0) -> float:
    groups = np.zeros(len(chosen), dtype=np.int64)
    (p,) = permutation_test(scores[None], chosen, groups, draws=draws, random=np.random.default_rng(seed))
    return float(p)


def test_the_p_value_is_the_share_of_choices_that_score_as_high() -> None:
    scores = np.array([0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5])
    chosen = np.array([True, False, True, False, False, False, True, False])
    sums = [scores[[*some]].sum() for some in combinations(range(8), 3)]
    exact = np.mean([total >= scores[chosen].sum() - 1e-9 for total in sums])  # 3 of 56
    found = [one_group(scores, chosen, seed=seed) for seed in range(200)]
    # a p-value ends at its 20th hit, so one has a spread of a fifth or so; their inverses have the mean 1 / exact
    assert 1 / np.mean([1 / p for p in found]) == pytest.approx(exact, rel=0.06)


def test_a_rare_choice_has_the_least_p_value_that_the_draws_allow_and_never_zero() -> None:
    assert one_group(np.arange(40.0), np.arange(40) >= 20, draws=999) == 1 / 1000


def test_a_test_that_shows_nothing_ends_early() -> None:
    assert one_group(np.zeros(10), np.arange(10) < 5) == ENOUGH / ENOUGH


def test_only_others_of_the_same_group_are_chosen_in_place() -> None:
    scores = np.array([[5.0, 5.0, 5.0, 0.0, 0.0, 0.0], [5.0, 5.0, 0.0, 1.0, 0.0, 0.0]])
    chosen, groups = np.array([True, True, False, True, False, False]), np.array([0, 0, 0, 1, 1, 1])
    within, between = permutation_test(scores, chosen, groups, draws=50_000, random=np.random.default_rng(1))
    assert within == 1.0  # that one group scores higher than the other is no evidence
    assert between == pytest.approx(1 / 9, rel=0.7)  # 3 ways to choose 2 of 3, times 3 to choose 1 of 3


def test_by_chance_a_p_value_is_below_a_threshold_as_often_as_the_threshold_says() -> None:
    random = np.random.default_rng(2)
    scores, chosen = random.random((400, 30)), np.arange(30) < 10
    p_values = permutation_test(scores, chosen, np.zeros(30, dtype=np.int64), draws=2000, random=random)
    assert (p_values <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert (p_values <= 0.5).mean() == pytest.approx(0.5, abs=0.1)


def test_holms_correction_by_hand() -> None:
    assert holm(np.array([0.04, 0.01, 0.03, 0.5])).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []
