"""Many runs: one after another where each has a whole Ray cluster, else as many at once as there are cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from semcons_ray.config import (
    ExperimentConfig,
    merge_settings,
    validate_config,
    validate_shared,
    without_effect,
    without_settings,
)
from semcons_ray.errors import ConfigError, RunFolderError, SemconsError
from semcons_ray.metering.energy import detect_meter
from semcons_ray.metering.environment import usable_cpus
from semcons_ray.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A run that is to be done, or has been: its settings and its folder."""

    config: ExperimentConfig
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / "config.yaml").is_file() and RunFolder(self.folder).is_finished(self.config.num_rounds)

    def check_settings(self) -> None:
        """Make sure that the folder, if it is there, is of a run with these settings; where it ran may differ.

        Raises:
            RunFolderError: It is not; one line that names the setting.
        """
        if not self.folder.exists():
            return
        wanted = self.config.model_dump(exclude={"resources": True})
        stored = RunFolder(self.folder).read_config().model_dump(exclude={"resources": True})
        if wanted["model"]["dtype"] == "auto":
            stored["model"]["dtype"] = "auto"  # a run that has begun holds what it came to
        if difference := next(_differences(stored, wanted), ""):
            raise RunFolderError(f"{self.folder} was run with {difference}; remove it, or choose another --out")


def configure_runs(shared: dict[str, Any], runs: Sequence[tuple[str, dict[str, Any]]]) -> list[ExperimentConfig]:
    """Settings of runs that have some in common.

    Args:
        shared: Settings of all runs. One that has no effect in a run keeps its default there.
        runs: For each run, where its own settings were given, for messages, and these, which are laid over `shared`.

    Raises:
        ConfigError: A setting is refused, or has no effect: a run's own in that run, a shared one in any.
    """
    configs = []
    idle: set[str] | None = None
    for where, own in runs:
        values, others = merge_settings(shared, own), without_settings(shared, own)
        unused = {key for key, _ in without_effect(validate_shared(values, where=where, shared=others))}
        idle = unused if idle is None else idle & unused
        configs.append(validate_config(values, where=where, shared=others))
    if idle:
        raise ConfigError(f"experiment: {', '.join(sorted(idle))} has no effect in any run")
    return configs


def _differences(stored: dict[str, Any], wanted: dict[str, Any], above: str = "") -> Iterator[str]:
    for key in wanted:
        one, other = stored[key], wanted[key]
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            yield from _differences(one, other, f"{above}{key}.")
        elif one != other:
            yield f"{above}{key} = {one!r}, and not {other!r}"


SomeJob = TypeVar("SomeJob", bound=Job)


def run_jobs(jobs: Sequence[SomeJob], report: Callable[[SomeJob, Callable[[], float]], None]) -> None:
    """Run, or resume, each job.

    With `resources.fleet` ray, jobs follow one another. With local, each is in a process of its own, cores //
    `resources.threads_per_worker` at once; a process goes on to further jobs, so it imports torch once. Where energy is
    metered it is one at a time, since a node's counter cannot tell processes apart.

    Args:
        jobs: With distinct folders.
        report: Called with a job when it is done, and with what gives the seconds it took or raises its error.

    Raises:
        SemconsError: A process died.
    """
    if any(job.config.resources.fleet == "ray" for job in jobs):
        for job in jobs:
            report(job, functools.partial(perform, job))
        return
    threads = max((job.config.resources.threads_per_worker for job in jobs), default=1)
    uses_gpu = any(job.config.resources.device == "cuda" for job in jobs)
    metered = detect_meter(uses_gpu=uses_gpu) is not None
    processes = 1 if metered else max(1, min(len(jobs), usable_cpus() // threads))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (threads,)) as pool:
        futures = {pool.submit(perform, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                report(futures[future], future.result)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise SemconsError("the process of a run died, perhaps for want of memory") from error
            raise


def _start_process(threads: int) -> None:
    """Set a process up before it imports torch: its threads, and that it dies when its parent does."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends this one
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


class Silent:
    """An `experiment.Observer` of one run among many."""

    def stage(self, *_: Any, **__: Any) -> None:
        """Say nothing."""

    planned = round_begins = client_done = round_ends = stage


def perform(job: Job, observer: Silent | None = None) -> float:
    """Run or resume; returns the seconds that it took."""
    from semcons_ray.runs.experiment import resume_experiment, run_experiment

    began = time.monotonic()
    observer = observer or Silent()
    if job.folder.exists():
        folder = RunFolder(job.folder)
        # Where it runs may have been changed since, which leaves its numbers as they are.
        folder.write_config(folder.read_config().model_copy(update={"resources": job.config.resources}))
        resume_experiment(job.folder, observer)
    else:
        run_experiment(job.config, job.folder, observer)
    return time.monotonic() - began


def warn_of_losses(folder: Path, said: set[str], say: Callable[[str], None]) -> None:
    """Say what too much of a run's data is lost by, unless it has been said of another run."""
    for text in [str(tally) for tally in RunFolder(folder).tallies() if tally.is_warning]:
        if text not in said:
            said.add(text)
            say(f"warning: {text}")


def slug(label: str) -> str:
    """A folder's name for a label."""
    return re.sub(r"[^\w.]+", "-", label.casefold()).strip("-.")
