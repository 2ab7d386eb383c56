"""A run in a user's process: it works wherever it is called, and leaves the process as it found it."""

import asyncio
import logging
import os
import random
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import semcons_ray as sr

pytestmark = pytest.mark.real

Make = Callable[..., sr.ExperimentConfig]


def state() -> dict[str, Any]:
    """What belongs to the whole process."""
    loggers = [logging.getLogger(name) for name in ("", "ray", "semcons_ray", "transformers", "datasets")]
    return {
        "variables": dict(os.environ),
        "levels": [logger.level for logger in loggers],
        "handlers": [[*logger.handlers] for logger in loggers],
        "warnings": [*warnings.filters],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "folder": Path.cwd(),
        "hook": sys.excepthook,
    }


@pytest.fixture
def threads() -> Iterator[None]:
    """A number of threads that no run has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def warm(tiny_config: Make, tmp_path: Path) -> None:
    """Import all that a run imports, which may set variables for good."""
    sr.run(tiny_config(num_rounds=1), out=tmp_path / "warm")


class Fails(sr.Observer):
    def round_ends(self, commit: sr.Commit) -> None:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("warm", "threads")
def test_a_run_leaves_its_process_as_it_was(tiny_config: Make, tmp_path: Path) -> None:
    before = state()
    sr.run(tiny_config(num_rounds=1), out=tmp_path / "run")
    assert state() == before
    sr.plan(tiny_config(num_rounds=1))
    assert state() == before
    with pytest.raises(KeyboardInterrupt):
        sr.run(tiny_config(num_rounds=1), out=tmp_path / "stopped", observers=[Fails()])
    assert state() == before


def test_a_run_works_in_a_running_event_loop_and_in_a_thread_of_one(tiny_config: Make, tmp_path: Path) -> None:
    async def work() -> list[sr.Run]:
        inside = sr.run(tiny_config(num_rounds=1), out=tmp_path / "inside")
        calls = [asyncio.to_thread(sr.run, tiny_config(num_rounds=1), out=tmp_path / name) for name in ("a", "b")]
        return [inside, *await asyncio.gather(*calls)]

    inside, *others = asyncio.run(work())
    for other in others:  # one after another, since threads and the like are the whole process's
        assert other.metrics["nll"].tolist() == inside.metrics["nll"].tolist()
    first, second = (run.rounds for run in others)
    spans = sorted((rounds["started_at"].min(), (rounds["started_at"] + rounds["duration_seconds"]).max())
                   for rounds in (first, second))  # fmt: skip
    assert spans[0][1] <= spans[1][0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("warm", "threads")
def test_a_run_on_ray_in_an_event_loop_leaves_its_process_as_it_was(tiny_config: Make, tmp_path: Path) -> None:
    import ray

    config = tiny_config(num_rounds=1, clients={"num_clients": 2}, resources={"fleet": "ray", "max_workers": 1})

    async def work() -> sr.Run:
        return sr.run(config, out=tmp_path / "run")

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before = state()
    assert asyncio.run(work()).finished
    assert not ray.is_initialized()
    after = state()
    assert {key for key in before if before[key] != after[key]} == set()


RULE = """\
import os


def nearest(ballots):
    assert os.environ["MINE"] == "kept"
    return ballots.similarity.nan_to_num(-1.0)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_the_user_has_started_is_used_and_left_running(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    (tmp_path / "my_rule.py").write_text(textwrap.dedent(RULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MINE", "kept")  # for the driver, which is not of the environment below
    own = {"env_vars": {"MINE": "kept", "PYTHONPATH": str(tmp_path)}}
    ray.init(address="local", num_cpus=2, namespace="mine", runtime_env=own, include_dashboard=False)
    try:
        before = ray.get_runtime_context().get_job_id(), ray.get_runtime_context().namespace
        config = tiny_config(
            clients={"num_clients": 2}, resources={"fleet": "ray", "max_workers": 1},
            algorithm={"rule": "my_rule:nearest"},
        )  # fmt: skip
        assert sr.run(config, out=tmp_path / "run").finished
        assert ray.is_initialized()
        assert (ray.get_runtime_context().get_job_id(), ray.get_runtime_context().namespace) == before
        assert ray.get(ray.remote(lambda: os.environ["MINE"]).remote()) == "kept"
    finally:
        ray.shutdown()


def test_a_run_outside_the_main_thread_sets_no_signals(tiny_config: Make, tmp_path: Path) -> None:
    found: list[sr.Run] = []
    work = threading.Thread(target=lambda: found.append(sr.run(tiny_config(num_rounds=1), out=tmp_path / "run")))
    work.start()
    work.join()
    assert found[0].finished
