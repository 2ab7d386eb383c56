"""Whatever is killed, and whenever: the run completes or resumes, with the numbers of one that nobody touched."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [
    *(pytest.mark.long, pytest.mark.ray, pytest.mark.slow, pytest.mark.real),
    pytest.mark.usefixtures("one_cluster"),
]

MakeConfig = Callable[..., ExperimentConfig]

RAY = {"fleet": "ray", "device": "cpu", "max_workers": 2}


@pytest.fixture(scope="module")
def undisturbed(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_experiment(tiny_config(), out, Silent())
    return out


def kill_actor(name: str) -> None:
    """kill -9 of one actor of this run."""
    mine = [
        child for child in psutil.Process().children(recursive=True) if name in child.name() + " ".join(child.cmdline())
    ]
    assert mine, f"no process of {name}"
    os.kill(mine[0].pid, signal.SIGKILL)


@pytest.mark.parametrize(("actor", "rounds"), [("ray::WorkerActor", {1, 2}), ("ray::ServerActor", {1})])
def test_an_actor_killed_in_mid_round_changes_nothing(
    tiny_config: MakeConfig, undisturbed: Path, tmp_path: Path, actor: str, rounds: set[int]
) -> None:
    killed: set[int] = set()

    def kill_once_a_round(reply: Reply) -> None:
        if reply.round in rounds - killed:
            killed.add(reply.round)
            kill_actor(actor)

    run_experiment(tiny_config(resources=RAY), tmp_path / "run", Silent(kill_once_a_round))
    assert killed == rounds
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_worker_that_starts_again_where_the_folder_is_not_shared_is_given_what_it_needs(
    tiny_config: MakeConfig, undisturbed: Path, tmp_path: Path
) -> None:
    def lose_sight(reply: Reply) -> None:
        """As if the worker's node were lost, and the next one had a folder of its own under the same path."""
        for seen in (tmp_path / "run" / "state").glob(".mark-*"):
            seen.unlink()
            kill_actor("ray::WorkerActor")

    run_experiment(tiny_config(resources={**RAY, "max_workers": 1}), tmp_path / "run", Silent(lose_sight))
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_driver_killed_at_two_random_points_resumes_to_the_same_numbers(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """Each kill comes 0 to 2 s after the first sign of progress of the driver, or of the one that resumed after it."""
    run_experiment(tiny_config(num_rounds=6), tmp_path / "undisturbed", Silent())
    out, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config(num_rounds=6, resources={**RAY, "max_workers": 1})))
    arguments = ["run", str(config), "--out", str(out)]
    draw = random.Random(7)
    for _ in range(2):
        driver = start(arguments)
        before = progress(out)
        deadline = time.monotonic() + 120
        while driver.poll() is None and progress(out) <= before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2 * draw.random())
        assert driver.poll() is None, "it ended before it could be killed"
        driver.kill()
        driver.wait()
        if (out / "config.yaml").exists():
            arguments = ["resume", str(out)]
    last = start(arguments)
    output, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert "report:" in output
    assert_same_run(tmp_path / "undisturbed", out)


def progress(out: Path) -> int:
    """The last round with a visit or a commit on disk; whether there is a folder at all."""
    return out.exists() + max((int(path.stem[-3:]) + 1 for path in out.glob("state/**/round_*")), default=0)


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "semcons_ray.commands.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_finished_run_resumes_to_itself(tiny_config: MakeConfig, undisturbed: Path) -> None:
    visits: list[Reply] = []
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.parquet/*")}
    assert before
    resume_experiment(undisturbed, Silent(visits.append))
    assert not visits
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.parquet/*")} == before
