"""When clients are there."""

import math
from pathlib import Path

import pytest

from semcons_ray.errors import ConfigError
from semcons_ray.timeline.availability import DAY, HOUR, Always, Diurnal, Trace, is_ever_there


def test_always() -> None:
    assert Always().window(3, 0.5, 1e9) == (-math.inf, math.inf)


def test_diurnal_windows_by_hand() -> None:
    nights = Diurnal(hours=8)  # client with chance 0.25 comes six hours after the others' midnight
    assert nights.window(0, 0.25, 0) == (6 * HOUR, 14 * HOUR)
    assert nights.window(0, 0.25, 7 * HOUR) == (6 * HOUR, 14 * HOUR)
    assert nights.window(0, 0.25, 14 * HOUR) == (DAY + 6 * HOUR, DAY + 14 * HOUR)
    assert nights.window(0, 0.75, 0) == (-6 * HOUR, 2 * HOUR)  # it came the evening before
    assert Diurnal(hours=24).window(0, 0.3, 5.0) == (-math.inf, math.inf)
    assert Diurnal(hours=8, zones_hours=0).window(0, 0.9, 0) == (0, 8 * HOUR)


@pytest.mark.parametrize("hours", [0.5, 8.0, 23.9])
def test_a_window_ends_after_the_time_asked_for(hours: float) -> None:
    for tenth in range(0, 400):
        seconds = tenth * 977.0
        start, end = Diurnal(hours=hours).window(0, (tenth % 7) / 7, seconds)
        assert end > seconds
        assert end - start == pytest.approx(hours * HOUR)
        assert start <= seconds or start - seconds <= DAY - hours * HOUR + 1e-6  # and is the next one


def trace(folder: Path, text: str, **options: float) -> Trace:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return Trace(str(path), **options)


def test_a_trace_is_repeated_and_shared_out(tmp_path: Path) -> None:
    found = trace(tmp_path, "client_id,start_hours,end_hours\n0,1,2\n1,0,1\n0,1.5,3\n", hours=10)
    assert found.window(0, 0.5, 0) == (1 * HOUR, 3 * HOUR)  # those that overlap are one
    assert found.window(0, 0.5, 3 * HOUR) == (11 * HOUR, 13 * HOUR)
    assert found.window(1, 0.5, 0) == (0, 1 * HOUR)
    assert found.window(2, 0.5, 25 * HOUR) == (31 * HOUR, 33 * HOUR)  # as client 0


def test_a_client_of_which_a_trace_says_nothing_never_comes(tmp_path: Path) -> None:
    found = trace(tmp_path, "client_id,start_hours,end_hours\n1,0,1\n")
    assert found.window(0, 0.5, 0) == (math.inf, math.inf)
    assert is_ever_there(found, [0.1, 0.2])
    assert not is_ever_there(found, [0.1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client_id,start_hours,end_hours\n", "says of no client"),
        ("client_id,start_hours\n0,1\n", "line 2: there is no column end_hours"),
        ("client_id,start_hours,end_hours\n0,1,2\n0,two,3\n", "line 3"),
        ("client_id,start_hours,end_hours\n0,2,2\n", "start before its end"),
        ("client_id,start_hours,end_hours\n-1,0,2\n", "a client from 0"),
        ("client_id,start_hours,end_hours\n0,0,nan\n", "start before its end"),
    ],
)
def test_a_trace_that_is_not_as_it_must_be(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        trace(tmp_path, text)
    assert "federation.availability_options.path" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trace_that_is_not_there_or_longer_than_its_period(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Trace(str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match="hours 1 is before the last end"):
        trace(tmp_path, "client_id,start_hours,end_hours\n0,0,2\n", hours=1)
