"""What a link carries, in closed form."""

import dataclasses
import math

import pytest

from semcons_ray.timeline.links import Link

LINE = Link(up_mbit=8, down_mbit=80, latency_ms=50)


def test_headers_take_their_share_of_a_line():
    assert LINE.up_bytes_per_second == pytest.approx(1e6 * 1448 / 1500)
    assert LINE.down_bytes_per_second == pytest.approx(1e7 * 1448 / 1500)
    assert LINE.latency_seconds == 0.05


def test_loss_bounds_a_fast_line_and_not_a_slow_one():
    lossy = dataclasses.replace(LINE, loss=1e-4)
    assert lossy.down_bytes_per_second == pytest.approx(1448 / 0.1 * 1.2247 / 0.01, rel=1e-4)
    assert lossy.up_bytes_per_second == LINE.up_bytes_per_second


def test_four_times_the_loss_or_twice_the_round_trip_halve_the_rate():
    slow = dataclasses.replace(LINE, loss=0.01)
    for worse in (dataclasses.replace(slow, loss=0.04), dataclasses.replace(slow, latency_ms=100)):
        assert worse.up_bytes_per_second == pytest.approx(slow.up_bytes_per_second / 2)


def test_without_a_round_trip_a_loss_is_mended_at_once():
    near = dataclasses.replace(LINE, latency_ms=0, loss=0.1)
    assert math.isclose(near.up_bytes_per_second, LINE.up_bytes_per_second)


def test_energy_by_direction():
    radio = dataclasses.replace(LINE, joules_per_megabyte_up=2, joules_per_megabyte_down=0.5)
    assert radio.joules(3_000_000, 4_000_000) == 3 * 2 + 4 * 0.5
