import math

import numpy as np
import pytest

from semcons_ray.evaluation.bootstrap import NUM_RESAMPLES, FloatArray, bootstrap


def mean_of(values: FloatArray):
    return lambda items: items @ values / len(values)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(mean_of(values), len(values))
    assert interval.value == pytest.approx(values.mean())
    error = values.std() / math.sqrt(len(values))
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (interval.low + interval.high) / 2 == pytest.approx(values.mean(), abs=0.2 * error)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = [
        interval.low <= 0.3 <= interval.high
        for interval in (bootstrap(mean_of(random.binomial(1, 0.3, 100).astype(float)), 100) for _ in range(200))
    ]
    assert 0.9 <= np.mean(covered) <= 0.98


def test_the_draws_are_the_same_each_time_and_as_many_as_is_said() -> None:
    drawn: list[FloatArray] = []
    for _ in range(2):
        bootstrap(lambda items: drawn.append(items) or np.zeros(len(items)), 7)
    assert sum(len(items) for items in drawn) == 2 * (1 + NUM_RESAMPLES)
    half = len(drawn) // 2
    assert all(np.array_equal(one, other) for one, other in zip(drawn[:half], drawn[half:], strict=True))
    assert set(np.concatenate(drawn).sum(axis=1)) == {7.0}


def test_the_draws_of_many_items_are_made_in_parts() -> None:
    sizes = []
    bootstrap(lambda items: sizes.append(items.size) or items[:, 0], 10_000)
    assert max(sizes) <= 4_000_000
    assert sum(sizes) == 10_000 * (1 + NUM_RESAMPLES)


def test_one_item_tells_nothing_of_others() -> None:
    interval = bootstrap(lambda items: items[:, 0], 1)
    assert interval.value == 1.0
    assert math.isnan(interval.low)


def test_resamples_without_a_value_do_not_count() -> None:
    interval = bootstrap(lambda items: np.where(items[:, 0] > 0, 3.0, np.nan), 5)
    assert (interval.low, interval.high) == (3.0, 3.0)
    assert math.isnan(bootstrap(lambda items: np.full(len(items), np.nan), 5).low)
