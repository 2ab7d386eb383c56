"""Many runs: one after another where each has a whole Ray cluster, else as many at once as cores or GPUs allow."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
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
from semcons_ray.distributed.placement import in_steps
from semcons_ray.errors import ConfigError, SemconsError
from semcons_ray.metering.environment import usable_cpus
from semcons_ray.metering.gpus import cuda_fault, visible_gpus
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
        if self.folder.exists():
            RunFolder(self.folder).settings_to_resume(self.config)


def configure_runs(shared: dict[str, Any], runs: Sequence[tuple[str, dict[str, Any]]]) -> list[ExperimentConfig]:
    """Settings of runs that have some in common.

    Args:
        shared: Settings of all runs. One that has no effect in a run keeps its default there.
        runs: For each run, where its own settings were given, for messages, and these, which are laid over `shared`.

    Raises:
        ConfigError: A setting is refused, or has no effect: a run's own in that run, a shared one in any.
    """
    validate_shared(shared, where="experiment", shared=shared)
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


SomeJob = TypeVar("SomeJob", bound=Job)


def run_jobs(jobs: Sequence[SomeJob], report: Callable[[SomeJob, Callable[[], float]], None]) -> None:
    """Run, or resume, each job.

    With `resources.fleet` ray, or `energy.exclusive`, jobs follow one another. Else each is in a process of its own; a
    process goes on to further jobs, so it imports torch once. On CPUs there are cores // `resources.threads_per_worker`
    of them; on GPUs as many as the GPUs have room for, each with one GPU in sight.

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
    configs = [job.config for job in jobs]
    threads = max((config.resources.threads_per_worker for config in configs), default=1)
    gpus = [] if cuda_fault() else [gpu.uuid for gpu in visible_gpus()]
    places = plan_processes(configs, gpus, usable_cpus() // threads)
    with start_processes(places, threads) as pool:
        futures = {pool.submit(perform, job, alone=len(places) == 1): job for job in jobs}
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


def plan_processes(configs: Sequence[ExperimentConfig], gpus: Sequence[str], cpus: int) -> list[str]:
    """The GPU of each process that runs experiments one after another; empty where they are on the CPU.

    GPUs are dealt out in turn, so that processes share one only when there are more of them than GPUs.

    Args:
        configs: What is to be run, each in one process.
        gpus: UUIDs of the GPUs that torch can use.
        cpus: How many processes the cores are enough for.
    """
    on_gpus = [config for config in configs if gpus and config.resources.device != "cpu"]
    count = 1 if any(config.energy.exclusive for config in configs) else len(configs)
    if not on_gpus:
        return [""] * max(1, min(count, cpus))
    a_gpu = max(1, int(1 / max(map(gpu_share, on_gpus)) + 1e-6))
    return [gpu for _ in range(a_gpu) for gpu in gpus][:count]


def gpu_share(config: ExperimentConfig) -> float:
    """What a process takes of a GPU that has all of an experiment in it: clients, server and engines."""
    resources = config.resources
    engines = len(set(config.client_models())) if config.generation.engine == "vllm" else 0
    return in_steps(resources.gpus_per_worker + resources.server_gpus + engines * resources.engine_gpus)


def start_processes(gpus: Sequence[str], threads: int) -> ProcessPoolExecutor:
    """A process for each of `gpus`, which sees that GPU and no other, or whatever its parent does where it is empty."""
    context = multiprocessing.get_context("spawn")
    left = context.SimpleQueue()
    for gpu in gpus:
        left.put(gpu)
    return ProcessPoolExecutor(len(gpus), context, _start_process, (threads, left))


def _start_process(threads: int, gpus: SimpleQueue[str]) -> None:
    """Set a process up before it imports torch: its threads, its GPU, and that it dies when its parent does."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if gpu := gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
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


def perform(job: Job, observer: Silent | None = None, *, alone: bool = True) -> float:
    """Run or resume, see `run_experiment`; returns the seconds that it took."""
    from semcons_ray.runs.experiment import resume_experiment, run_experiment

    began = time.monotonic()
    observer = observer or Silent()
    if job.folder.exists():
        folder = RunFolder(job.folder)
        folder.write_config(folder.settings_to_resume(job.config))
        resume_experiment(job.folder, observer, alone=alone)
    else:
        run_experiment(job.config, job.folder, observer, alone=alone)
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
