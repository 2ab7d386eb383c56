"""Transfers that share a link, against times worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy import Environment

from semcons_ray.timeline.pipe import Pipe

Transfer = tuple[float, float, float]
"""When it begins, its bytes, and its line's bytes a second."""


def ends(capacity: float, *transfers: Transfer) -> list[float]:
    env = Environment()
    pipe = Pipe(env, capacity)
    ended = [0.0] * len(transfers)

    def one(place: int, begin: float, size: float, speed: float):
        yield env.timeout(begin)
        yield pipe.transfer(size, speed)
        ended[place] = env.now

    for place, transfer in enumerate(transfers):
        env.process(one(place, *transfer))
    env.run()
    return ended


def test_one_goes_at_the_speed_of_its_line_or_of_the_pipe() -> None:
    assert ends(100, (0, 1000, 10)) == pytest.approx([100])
    assert ends(100, (5, 1000, 400)) == pytest.approx([15])


def test_equals_share_evenly() -> None:
    assert ends(100, *[(0, 1000, 400)] * 4) == pytest.approx([40] * 4)


def test_what_slow_lines_leave_goes_to_the_fast() -> None:
    # 10 bytes a second for the slow one, 90 for the fast: it is through after 10 s, and the slow one after 100.
    assert ends(100, (0, 1000, 10), (0, 900, 400)) == pytest.approx([100, 10])


def test_one_that_comes_later_slows_those_that_are_there() -> None:
    # 1000 bytes alone until 5 s, so that 500 are left; then both at 50 until the first is through at 15 s; then the
    # other has 500 left and the pipe for itself.
    assert ends(100, (0, 1000, 400), (5, 1000, 400)) == pytest.approx([15, 20])


def test_three_speeds_and_three_begins() -> None:
    # 0 to 2 s: the first at 60 of 60. 2 to 4: the first and the second at 50 and 50. From 4 on the third, of 10, is
    # there: 45, 45, 10. The first has 1000 - 120 - 100 left, which takes 780 / 45 s.
    first = 4 + (1000 - 60 * 2 - 50 * 2) / 45
    second_left = 1000 - 50 * 2 - 45 * (first - 4)
    third_left = 300 - 10 * (first - 4)
    second = first + second_left / 70
    third = first + third_left / 10
    assert ends(100, (0, 1000, 60), (2, 1000, 70), (4, 300, 10)) == pytest.approx([first, second, third])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(1, 1e9), st.sampled_from([1e3, 1e4, 1.5e5, 1e7])),
        min_size=1,
        max_size=20,
    ),
    st.floats(1e3, 1e8),
)
def test_nothing_is_faster_than_its_line_and_nothing_is_lost(transfers: list[Transfer], capacity: float) -> None:
    ended = ends(capacity, *transfers)
    for (begin, size, speed), end in zip(transfers, ended, strict=True):
        assert end - begin >= size / min(speed, capacity) * (1 - 1e-6) - 1e-8  # a few units in the last place of a time
    # A pipe that is never idle while there is work is through when the bytes are, at the latest after the last begin.
    last = max(begin for begin, _, _ in transfers)
    slowest = max(size / min(speed, capacity / len(transfers)) for _, size, speed in transfers)
    assert max(ended) <= (last + slowest) * (1 + 1e-6)
