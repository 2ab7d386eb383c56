"""Many runs: one after another where each has a whole Ray cluster, else as many at once as there are cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from semcons_ray.config import ExperimentConfig
from semcons_ray.errors import SemconsError
from semcons_ray.metering.energy import detect_meter
from semcons_ray.metering.environment import usable_cpus
from semcons_ray.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A run that is to be done, or has been: its settings and its folder."""

    config: ExperimentConfig
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / "config.yaml").is_file() and RunFolder(self.folder).is_finished(self.config.num_rounds)


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
            report(job, functools.partial(_perform, job))
        return
    threads = max((job.config.resources.threads_per_worker for job in jobs), default=1)
    uses_gpu = any(job.config.resources.device == "cuda" for job in jobs)
    metered = detect_meter(uses_gpu=uses_gpu) is not None
    processes = 1 if metered else max(1, min(len(jobs), usable_cpus() // threads))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (threads,)) as pool:
        futures = {pool.submit(_perform, job): job for job in jobs}
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


class _Silent:
    """An `experiment.Observer` of one run among many."""

    def stage(self, *_: Any, **__: Any) -> None:
        """Say nothing."""

    planned = round_begins = client_done = round_ends = stage


def _perform(job: Job) -> float:
    """Run or resume; returns the seconds that it took."""
    from semcons_ray.experiment import resume_experiment, run_experiment

    began = time.monotonic()
    if job.folder.exists():
        folder = RunFolder(job.folder)
        # Where it runs may have been changed since, which leaves its numbers as they are.
        folder.write_config(folder.read_config().model_copy(update={"resources": job.config.resources}))
        resume_experiment(job.folder, _Silent())
    else:
        run_experiment(job.config, job.folder, _Silent())
    return time.monotonic() - began
