"""Runs many experiments: one after another if each uses the whole Ray cluster, else as many at once as there is room
for."""

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

from pydantic import ValidationError

from semcons_ray.config import (
    ExperimentConfig,
    Layers,
    Settings,
    Source,
    as_study,
    merge_settings,
    refusal,
    validate_config,
    validate_shared,
    without_effect,
    without_settings,
)
from semcons_ray.distributed.placement import in_steps
from semcons_ray.errors import ConfigError, SemconsError
from semcons_ray.metering.environment import usable_cpus
from semcons_ray.metering.gpus import cuda_fault, visible_gpus
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.remote_folder import RemoteStudy, copying
from semcons_ray.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A run to do, or one that was done."""

    config: ExperimentConfig
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self.folder / "config.yaml").is_file() and RunFolder(self.folder).is_finished(self.config.num_rounds)

    def check_settings(self) -> None:
        """Check that the folder, if it exists, is of a run with these settings, but for those of where it ran.

        Raises:
            RunFolderError: It is not; the message names the setting that differs.
        """
        if self.folder.exists():
            RunFolder(self.folder).settings_to_resume(self.config)


Study = TypeVar("Study", bound=Settings)


def load_study(kind: type[Study], source: Source, overrides: dict[str, Any] | None = None) -> Study:
    """Read the settings of a comparison or a sweep.

    Args:
        kind: The class of its settings, one of which is `experiment`.
        source: Where settings are read from. A place that has none of the study's own holds those of the experiment.
        overrides: Settings of the experiment that are laid over those of the files.

    Raises:
        ConfigError: A file is missing or not YAML, or a key or value is refused; the message names the file and the
            key.
    """
    own = kind.model_fields.keys() - ExperimentConfig.model_fields.keys()
    read = Layers.read(source, as_study(overrides) if overrides else None).parts
    parts = [(name, values if values.keys() & own else as_study(values)) for name, values in read]
    study = Layers(tuple(parts))
    values = study.merged()
    experiments = [(f"{name}, experiment", part.get("experiment") or {}) for name, part in parts]
    if all(isinstance(settings, dict) for _, settings in experiments):
        experiment = Layers(tuple(experiments))
        values["experiment"] = experiment.merged()
        validate_shared(values["experiment"], where=experiment.where, shared=values["experiment"])
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise refusal(error, study.where) from error


def configure_runs(shared: dict[str, Any], runs: Sequence[tuple[str, dict[str, Any]]]) -> list[ExperimentConfig]:
    """The settings of each of several runs that share some settings.

    Args:
        shared: Settings of all runs. One that has no effect in a run keeps its default there.
        runs: For each run, where its own settings come from, for messages, and those settings, which replace `shared`.

    Raises:
        ConfigError: A setting is refused; or one of a run's own has no effect in that run, or a shared one in no run.
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


def run_jobs(
    jobs: Sequence[SomeJob],
    report: Callable[[SomeJob, Callable[[], float]], None],
    remote: RemoteStudy | None = None,
) -> None:
    """Run or resume each job.

    With `resources.fleet` ray, or `energy.exclusive`, jobs run one after another. Else they run in several processes,
    each of which does one job after another, so that it imports torch once. On CPUs the number of processes is cores //
    `resources.threads_per_worker`; on GPUs it is as many as the GPUs have room for, and each process sees one GPU.

    Args:
        jobs: The jobs; their folders must differ.
        report: Called when a job is done, with the job and a function that returns its seconds or raises its error.
        remote: Where the study is kept as well.

    Raises:
        SemconsError: A process died.
    """
    if any(job.config.resources.fleet == "ray" for job in jobs):
        for job in jobs:
            report(job, functools.partial(perform, job, remote=remote))
        return
    configs = [job.config for job in jobs]
    threads = max((config.resources.threads_per_worker for config in configs), default=1)
    gpus = [] if cuda_fault() else [gpu.uuid for gpu in visible_gpus()]
    places = plan_processes(configs, gpus, usable_cpus() // threads)
    with start_processes(places, threads) as pool:
        futures = {pool.submit(perform, job, alone=len(places) == 1, remote=remote): job for job in jobs}
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
    """The GPU of each process that `run_jobs` starts; an empty text for a process on the CPU.

    GPUs are assigned in turn, so processes share one only if there are more processes than GPUs.

    Args:
        configs: The settings of each run.
        gpus: UUIDs of the GPUs that torch can use.
        cpus: Number of processes for which there are enough cores.
    """
    on_gpus = [config for config in configs if gpus and config.resources.device != "cpu"]
    count = 1 if any(config.energy.exclusive for config in configs) else len(configs)
    if not on_gpus:
        return [""] * max(1, min(count, cpus))
    a_gpu = max(1, int(1 / max(map(gpu_share, on_gpus)) + 1e-6))
    return [gpu for _ in range(a_gpu) for gpu in gpus][:count]


def gpu_share(config: ExperimentConfig) -> float:
    """Share of a GPU that a process takes which holds a whole experiment: clients, server and engines."""
    resources = config.resources
    engines = len(config.open_models) if config.generation.engine == "vllm" else 0
    return in_steps(resources.gpus_per_worker + resources.server_gpus + engines * resources.engine_gpus)


def start_processes(gpus: Sequence[str], threads: int) -> ProcessPoolExecutor:
    """A pool with a process for each of `gpus`, which sees only that GPU; where it is empty, what its parent sees."""
    context = multiprocessing.get_context("spawn")
    left = context.SimpleQueue()
    for gpu in gpus:
        left.put(gpu)
    return ProcessPoolExecutor(len(gpus), context, _start_process, (threads, left))


def _start_process(threads: int, gpus: SimpleQueue[str]) -> None:
    """Set up a process before it imports torch: its number of threads, its GPU, and that it ends with its parent."""
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


def perform(job: Job, *observers: Observer, alone: bool = True, remote: RemoteStudy | None = None) -> float:
    """Run or resume a job, see `run_experiment`, and copy it to where the study is kept as well; returns the seconds
    that it took."""
    from semcons_ray.runs.experiment import resume_experiment, run_experiment

    began = time.monotonic()
    kept = remote.of_run(job.folder) if remote else None
    observers = (*copying(kept), *observers)
    if job.folder.exists():
        folder = RunFolder(job.folder)
        folder.write_config(folder.settings_to_resume(job.config))
        resume_experiment(job.folder, *observers, alone=alone)
    else:
        run_experiment(job.config, job.folder, *observers, alone=alone)
    if kept:
        kept.copy()
    return time.monotonic() - began


def warn_of_losses(folder: Path, said: set[str], say: Callable[[str], None]) -> None:
    """Warn of losses of a run's data, unless the same was said of another run.

    Args:
        folder: The run's folder.
        said: Warnings given so far; new ones are added.
        say: Called with each warning.
    """
    for text in [str(tally) for tally in RunFolder(folder).tallies() if tally.is_warning]:
        if text not in said:
            said.add(text)
            say(f"warning: {text}")


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", label.casefold()).strip("-.")
