"""Observers share one list, and one that fails costs the run nothing."""

import logging
import math
from collections.abc import Sequence

import pytest

from semcons_ray.runs.observers import Observer, Observers
from semcons_ray.runs.run_folder import Commit, RoundRow


def commit(round: int) -> Commit:
    return Commit(
        summary=RoundRow(
            round=round, started_at=0.0, duration_seconds=1.0, num_participants=0, num_answered=0, lost="",
            failures="", num_labels=0, mean_agreement=math.nan, label_churn=math.nan,
        ),
        metrics=(),
        ledger=(),
    )  # fmt: skip


class Hearing(Observer):
    def __init__(self) -> None:
        self.heard: list[object] = []

    def begins(self, commits: Sequence[Commit]) -> None:
        self.heard.append([commit.summary.round for commit in commits])

    def round_ends(self, commit: Commit) -> None:
        self.heard.append(commit.summary.round)

    def ends(self, *, finished: bool) -> None:
        self.heard.append(finished)


class Failing(Hearing):
    """Fails when round 1 ends."""

    name = "the broken one"

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def round_ends(self, commit: Commit) -> None:
        super().round_ends(commit)
        if commit.summary.round == 1:
            raise self.error


def test_one_that_fails_is_named_once_and_told_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    first, failing, last = Hearing(), Failing(ValueError("it broke\nin two")), Hearing()
    observers = Observers([Observers([first, failing]), last])
    with observers.during([commit(0)]):
        for round in (1, 2):
            observers.round_ends(commit(round))
    assert first.heard == last.heard == [[0], 1, 2, True]
    assert failing.heard == [[0], 1]
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == ["the broken one failed, and is left out from now on: it broke"]


def test_ctrl_c_in_one_stops_the_run_and_the_others_hear_that_it_is_not_finished() -> None:
    failing, other = Failing(KeyboardInterrupt()), Hearing()
    observers = Observers([other, failing])
    with pytest.raises(KeyboardInterrupt), observers.during([]):
        observers.round_ends(commit(1))
    assert other.heard == [[], 1, False]
    assert failing.heard == [[], 1, False]
