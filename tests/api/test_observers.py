"""A user's observer hears all events of a run in order, and one that fails costs a warning."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import semcons_ray as sr

pytestmark = pytest.mark.real

Make = Callable[..., sr.ExperimentConfig]


class Hearing(sr.Observer):
    """Writes down what it hears."""

    name = "mine"

    def __init__(self) -> None:
        self.heard: list[object] = []

    def stage(self, text: str) -> None:
        self.heard.append(text)

    def planned(self, text: str) -> None:
        if "workers" in text:
            self.heard.append("placement")

    def begins(self, commits: Sequence[sr.Commit]) -> None:
        self.heard.append(("begins", len(commits)))

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        self.heard.append(("round begins", round, num_rounds, num_participants))

    def client_done(self, reply: sr.Reply) -> None:
        self.heard.append(("client", reply.client_id))

    def round_ends(self, commit: sr.Commit) -> None:
        self.heard.append(("round ends", commit.summary.round))

    def ends(self, *, finished: bool) -> None:
        self.heard.append(("ends", finished))


class Breaks(Hearing):
    def client_done(self, reply: sr.Reply) -> None:
        raise ValueError("my own mistake")


def test_an_observer_hears_all_in_order_and_one_that_fails_is_a_warning(
    tiny_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, broken, last = Hearing(), Breaks(), Hearing()
    with caplog.at_level(logging.WARNING):
        done = sr.run(tiny_config(num_rounds=1), out=tmp_path / "run", observers=iter((first, broken, last)))
    assert done.finished
    assert first.heard == last.heard == [
        "reading data",
        "finding models",
        "placement",
        "loading models",
        ("begins", 0),
        ("round begins", 0, 1, 1),
        ("client", 0),
        ("round ends", 0),
        ("round begins", 1, 1, 3),
        *(("client", client) for client in range(3)),
        ("round ends", 1),
        "writing adapters",
        ("ends", True),
    ]  # fmt: skip
    assert broken.heard == first.heard[:6]
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ["mine failed, and is left out from now on: my own mistake"]
    again = Hearing()
    sr.resume(done.path, observers=[again])
    assert again.heard == []  # nothing is left to do
