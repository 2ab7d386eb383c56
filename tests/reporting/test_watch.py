import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.reporting import watch as module
from semcons_ray.runs.experiment import resume_experiment
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.run_folder import Commit, RunFolder
from tests.invariants.runs import Silent, StoppedError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.02)


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "nothing")]) == 2
    assert f"{tmp_path}/nothing is not a folder" in capsys.readouterr().err


def test_a_lock_that_was_looked_at_can_be_taken_and_one_that_is_held_is_seen(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", validate_config({}, where="test"))
    assert not folder.is_in_use()
    with folder.locked():
        assert folder.is_in_use()
    assert not folder.is_in_use()


@contextlib.contextmanager
def watching(path: Path) -> Iterator[list[bool]]:
    """Watch a run in another thread; the list gets the exit code."""
    codes: list[bool] = []
    thread = threading.Thread(target=lambda: codes.append(module.watch(path)))
    thread.start()
    try:
        yield codes
    finally:
        thread.join(60)


@pytest.mark.slow
@pytest.mark.real
def test_rounds_are_shown_as_they_are_committed_and_how_it_ended(
    tiny_config: Callable[..., ExperimentConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[int, str] = {}

    class Waits(Observer):
        """Gives the watcher time after each round, and notes what it has shown."""

        def round_ends(self, commit: Commit) -> None:
            deadline = time.monotonic() + 30
            shown = ""
            while not re.search(r"^(base model|round \d).*\n\Z", shown, re.MULTILINE) and time.monotonic() < deadline:
                time.sleep(0.02)
                shown += capsys.readouterr().out
            seen[commit.summary.round] = shown

    def stop(reply: Any) -> None:
        if reply.round == 2:
            raise StoppedError

    run = tmp_path / "run"
    RunFolder.create(run, tiny_config())
    started = threading.Event()

    class Starts(Observer):
        def stage(self, text: str) -> None:
            started.set()

    def go() -> None:
        with contextlib.suppress(StoppedError):
            resume_experiment(run, Starts(), Waits(), Silent(stop))

    runner = threading.Thread(target=go)
    runner.start()
    assert started.wait(60)
    with watching(run) as codes:
        runner.join(120)
    assert [*seen] == [0, 1]
    assert re.fullmatch(r"base model  mean test NLL \d\.\d{3} of 3 clients  \(\d+ s\)\n", seen[0])
    assert re.fullmatch(
        r"round 1  mean test NLL .* pseudo-labels  \(\d+ s, [\d,]+ tokens/s, about 5 s left\)\n", seen[1]
    )
    assert codes == [False]
    assert f"semcons resume {run} goes on with it" in " ".join(capsys.readouterr().out.split())

    resume_experiment(run)
    assert main(["watch", str(run)]) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[:3]] == ["base model", "round 1", "round 2"]
    assert out.endswith(f"finished; semcons report {run} writes its report\n")
