"""run.log has the lines of all processes of a run."""

import logging
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.config import ExperimentConfig
from semcons_ray.federation.client import Client
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.tracking.run_log import VARIABLE, append_to_log, join_run_log, run_log
from tests.invariants.runs import Silent, StoppedError

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) ([\w-]+)@\S+ (\S+): ", re.MULTILINE)


def test_lines_of_this_package_and_warnings_of_others_are_there(tmp_path: Path) -> None:
    with run_log(tmp_path / "run.log", "driver"):
        logging.getLogger("semcons_ray.some").info("ours")
        logging.getLogger("semcons_ray.some").debug("too much")
        logging.getLogger("other").info("theirs")
        logging.getLogger("other").warning("their warning")
    logging.getLogger("other").warning("later")
    found = LINE.findall((tmp_path / "run.log").read_text())
    assert found == [("INFO", "driver", "semcons_ray.some"), ("WARNING", "driver", "other")]
    assert VARIABLE not in os.environ
    assert logging.getLogger("semcons_ray").level == logging.NOTSET


def test_what_ends_a_run_is_there_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_log(tmp_path / "run.log", "driver"):
        1 / 0  # noqa: B018
    assert "Traceback (most recent call last)" in (tmp_path / "run.log").read_text()
    assert "ZeroDivisionError: division by zero" in (tmp_path / "run.log").read_text()


def test_warnings_are_still_seen_where_logging_was_not_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with run_log(tmp_path / "run.log", "driver"):
        logging.getLogger("semcons_ray.some").warning("careful")
        logging.getLogger("semcons_ray.some").info("by the way")
    assert capsys.readouterr().err == "careful\n"
    assert logging.getLogger().handlers == []


def write_many(path: str, process: int) -> None:
    os.environ[VARIABLE] = path
    join_run_log(f"worker-{process}")
    join_run_log(f"worker-{process}")  # as when a model is loaded again
    for number in range(200):
        logging.getLogger("semcons_ray").info("%d %s", number, "x" * 5000)
    os._exit(0)  # as if it were killed


def test_lines_of_several_processes_are_whole_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.touch()  # as the driver does
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(str(path), index)) for index in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 600
    assert all(LINE.match(line) and line.endswith("x" * 5000) for line in lines)
    assert {name for _, name, _ in LINE.findall(path.read_text())} == {"worker-0", "worker-1", "worker-2"}


def test_a_process_that_does_not_see_the_folder_gives_its_lines_to_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, before = logging.getLogger(), [*logging.getLogger().handlers]
    monkeypatch.setenv("SEMCONS_RUN_LOG", str(tmp_path / "elsewhere" / "run.log"))
    try:
        afar = join_run_log("worker-5")
        logging.getLogger("semcons_ray.somewhere").warning("lost its way")
        lines = afar.take()
        assert [name for _, name, _ in LINE.findall(lines)] == ["worker-5"]
        assert lines.endswith("lost its way\n")
        assert afar.take() == ""
    finally:
        root.handlers[:] = before
    with run_log(tmp_path / "run.log", "driver"):
        append_to_log(lines)
    assert (tmp_path / "run.log").read_text() == lines


@pytest.mark.slow
@pytest.mark.real
def test_a_failed_clients_traceback_and_the_runs_story_are_there(
    tiny_config: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(reply: Any) -> None:
        if reply.round == 2:
            raise StoppedError

    fine_tune = Client.fine_tune

    def failing(client: Client, round: int, *args: Any, **more: Any) -> None:
        if round == 1 and client.client_id == 1:
            raise RuntimeError("it fell ill")
        fine_tune(client, round, *args, **more)

    monkeypatch.setattr(Client, "fine_tune", failing)
    with pytest.raises(StoppedError):
        run_experiment(tiny_config(), tmp_path / "run", Silent(stop))
    log = (tmp_path / "run" / "run.log").read_text()
    assert "client 1 failed in round 1\nTraceback (most recent call last)" in log
    assert "RuntimeError: it fell ill" in log
    assert "loading models" in log
    assert "round 1 is committed" in log
    assert log.count("the run ends here:\nTraceback") == 1
    resume_experiment(tmp_path / "run")
    assert (tmp_path / "run" / "run.log").read_text().startswith(log)
    assert "the run is finished" in (tmp_path / "run" / "run.log").read_text()
