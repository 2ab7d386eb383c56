"""Sweeps: trials, which are experiments that differ in a few settings, run and compared by Ray Tune.

A sweep's folder:

    sweep.yaml              what is tried, with every default written out
    trials/NAME/            a run folder for each trial; see runs/run_folder.py
    trials.csv, trials.parquet    a row for each trial
    report.html             Pareto fronts, effects of the keys
    stopped.json            trials that the scheduler stopped early
    virtual_time/           where all trials have a virtual clock: their replays; see studies/replays.py
    code/                   modules of parts of one's own, if there are any
    tune/                   what Tune's loggers write: CSV and JSON, in a folder for each trial

The same command again continues with what is not finished. What is done is read from the run folders and not from
Tune's own state: a folder's name follows from the trial's settings, so a sweep that was killed at any time, or was
given more values, finds its trials again. Each continues from its last committed round, and the searcher and the
scheduler are told the results of finished trials. Trials do not share resources: each has a placement group of its own,
and its clients' actors are placed in the bundles of that group (see distributed/cluster.py).
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from ray import tune
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from semcons_ray.config import ExperimentConfig, named_parts
from semcons_ray.distributed.cluster import connect, list_nodes, passed_on
from semcons_ray.distributed.placement import Node, choose_device, in_steps, packed
from semcons_ray.errors import PlacementError, RunFolderError, SemconsError, StorageError, writing
from semcons_ray.federation.store import check_mark, mark
from semcons_ray.metering.environment import with_variables
from semcons_ray.parts import keep_code, use_code
from semcons_ray.reporting.comparison import costs_by_round
from semcons_ray.reporting.sweep import SweepResult, write_sweep_report
from semcons_ray.reporting.tables import read_ledger, read_metrics, read_rounds
from semcons_ray.runs.assembly import find_models, kinds_of
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.own_process import as_found
from semcons_ray.runs.remote_folder import Copying, RemoteStudy
from semcons_ray.runs.run_folder import Commit, RunFolder, comparable_loss, held, write_file
from semcons_ray.runs.trackers import check_trackers
from semcons_ray.studies.batch import Job, gpu_share, perform, warn_of_losses
from semcons_ray.studies.search_space import Point, SweepConfig, dump_sweep, label, trial_name

ROUND = "round"

SETTINGS, TRIALS = "sweep.yaml", "trials/[!.]*"
"""The file with a sweep's settings, and a pattern of its run folders."""

CODE = "code"
"""Folder of a sweep with the code of parts of one's own."""

_TUNE_VARIABLES = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new kind prints what cannot be turned off
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # nothing is written to where a process happens to be
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends it at once: nothing is lost
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard's files are written by each run
}

_START_AT_ONCE = {"TUNE_MAX_PENDING_TRIALS_PG": "64"}
"""Of trials that are known beforehand, so many start at a time; else Tune starts one after the other, and a large
cluster is idle for minutes. Optuna is asked for a point only when there is room for it."""


@dataclass(frozen=True)
class Trial(Job):
    """One experiment of a sweep."""

    point: Point

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    def rounds(self) -> pd.DataFrame:
        """Its results by evaluated round; see `reporting.comparison.costs_by_round`."""
        return costs_by_round(read_metrics(self.folder), read_rounds(self.folder), read_ledger(self.folder))

    @property
    def has_results(self) -> bool:
        """Whether a round was evaluated."""
        return (self.folder / "config.yaml").is_file() and RunFolder(self.folder).has_tables()


def run_sweep(
    sweep: SweepConfig, out: Path, say: Callable[[str], None], remote: RemoteStudy | None = None
) -> tuple[SweepResult | None, int]:
    """Do the trials that are not finished, and write the results of all.

    Args:
        sweep: What to try; checked by `load_sweep`.
        out: A new folder, or that of a sweep of the same experiment.
        say: Called with a line for each trial.
        remote: Where it is kept as well; its trials are copied there as they go on.

    Returns:
        The results, None if no trial has any; and the number of trials that failed.

    Raises:
        UserError: A setting is refused, or `out` holds something else; then nothing has been run.
        StorageError: The disk is full, or cannot be written to.
    """
    out = out.resolve()
    check_trackers(sweep.configure(sweep.first()))
    trials = _trials(sweep, out)
    has_begun = remote or (out / "trials").exists()  # what is at a URL was looked at when it was fetched
    if out.exists() and not has_begun and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty and holds no sweep; choose another --out")
    for trial in trials:
        trial.check_settings()
    (out / "trials").mkdir(parents=True, exist_ok=True)
    with held(out / ".lock", out):
        write_file(out / SETTINGS, dump_sweep(sweep))
        keep_code(out / CODE, {part for point in sweep.tried() for part in named_parts(sweep.configure(point))})
        if remote:
            remote.copy()
        done = [trial for trial in trials if trial.finished or trial.name in _stopped(sweep, out)]
        total = sweep.num_samples if sweep.search == "optuna" else len(trials)
        if done:
            say(f"{len(done)} of {total} trials are finished")
        failed = 0
        if len(done) < total:
            failed = _tune(sweep, out, trials, done, total, say, remote)
        return _write_results(sweep, out), failed


def _trials(sweep: SweepConfig, out: Path) -> list[Trial]:
    """All trials; for optuna, which chooses points as it goes, those that it has chosen so far."""
    points: Sequence[Point | None] = sweep.points() or [
        sweep.point_of(RunFolder(path.parent).stored_config()) for path in sorted(out.glob("trials/[!.]*/config.yaml"))
    ]
    return [_trial(sweep, out, point) for point in points if point]


def _trial(sweep: SweepConfig, out: Path, point: Point) -> Trial:
    return Trial(sweep.configure(point), out / "trials" / trial_name(point), point)


def _tune(
    sweep: SweepConfig,
    out: Path,
    trials: Sequence[Trial],
    done: Sequence[Trial],
    total: int,
    say: Callable[[str], None],
    remote: RemoteStudy | None,
) -> int:
    """Run the trials that are not done; returns how many failed."""
    todo = [trial for trial in trials if trial not in done]
    experiment = sweep.configure(sweep.first())
    configs = [trial.config for trial in todo] or [experiment]
    for config in {tuple(config.clients_with()): config for config in configs}.values():
        find_models(config)  # before trials start, lest two convert the same model at once
    needed = [name for config in configs for kind in kinds_of(config, out).values() for name in kind.environment]
    progress = _Progress(sweep, out, len(done), total, say, remote)
    callbacks: list[tune.Callback] = [progress, *(kind() for kind in (CSVLoggerCallback, JsonLoggerCallback))]
    variables = _TUNE_VARIABLES | (_START_AT_ONCE if sweep.search != "optuna" else {})
    with as_found(), with_variables(variables, replace=True), connect(experiment.resources.ray_address):
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # a trial that fails is told of in a line of our own
        room = _Room(list_nodes())
        for config in configs:
            room.reserve(config)  # a trial that fits nowhere is refused now, since it would wait for ever
        at_once = _at_once(sweep, experiment)
        shared = {"sweep": sweep, "out": out, "marked": mark(out / "trials"), "variables": passed_on(needed),
                  "remote": remote}  # fmt: skip
        alone = 1 in (at_once, total - len(done))
        trainable = tune.with_parameters(_perform_trial, **shared, alone=alone)
        tuner = tune.Tuner(
            tune.with_resources(trainable, lambda point: room.reserve(sweep.configure(_decode(sweep, point)))),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(sweep, todo, done),
                scheduler=_scheduler(sweep, done),
                num_samples=total - len(done),
                max_concurrent_trials=at_once,
                reuse_actors=True,
                trial_name_creator=lambda trial: _name(sweep, trial),
                trial_dirname_creator=lambda trial: _name(sweep, trial),
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(out), verbose=0, callbacks=callbacks),
        )
        with warnings.catch_warnings(), writing(out):
            warnings.simplefilter("ignore")
            try:
                tuner.fit()
            finally:
                progress.check_storage()  # else Tune's own error, of a file it could not write, would hide a full disk
    return progress.failed


def _at_once(sweep: SweepConfig, experiment: ExperimentConfig) -> int | None:
    """Most trials at a time; None: as many as there is room for."""
    return 1 if experiment.energy.exclusive else sweep.max_concurrent_trials


@dataclass(frozen=True)
class _Room:
    """What the cluster could give one trial, if it had no other."""

    nodes: tuple[Node, ...]

    def reserve(self, config: ExperimentConfig) -> tune.PlacementGroupFactory:
        """A placement group with a bundle for each worker: as many as clients can use and the cluster has room for.
        Workers whose clients' answers come from elsewhere share these.

        A server on a GPU has a bundle before those. The trial's own process mostly waits, so it has an empty bundle,
        unless all clients are in that process (fleet local).

        Raises:
            PlacementError: The cluster has no room for one worker; the message names the setting to change.
        """
        resources = config.resources
        threads, share = resources.threads_per_worker, in_steps(resources.gpus_per_worker)
        on_gpus = choose_device(resources.device, self.nodes) == "cuda"
        if resources.fleet == "local":
            whole = gpu_share(config) if on_gpus else 0.0
            if whole > 1:
                raise PlacementError(
                    f"with resources.fleet local a trial is one process on one GPU, of which "
                    f"resources.gpus_per_worker, resources.server_gpus and resources.engine_gpus take {whole:g}; "
                    f"lower them"
                )
            return tune.PlacementGroupFactory([{"CPU": threads, "GPU": whole}])
        here = max(1, sum(len(config.clients_with()[model]) for model in config.open_models))
        wanted = min(resources.max_workers or here, here)
        if not on_gpus:
            fitting = sum(int(node.cpus // threads) for node in self.nodes)
            return _group({"CPU": threads}, max(1, min(wanted, fitting)))
        server = [in_steps(resources.server_gpus)] if resources.server_gpus else []
        left = packed([gpu for node in self.nodes if not node.cuda_fault for gpu in node.gpus], server)
        workers = 0
        while left is not None and workers < wanted and (left := packed(left, [share])) is not None:
            workers += 1
        if not workers:
            raise PlacementError(
                f"no trial fits: resources.gpus_per_worker = {share:g} and resources.server_gpus = "
                f"{resources.server_gpus:g} are more than the cluster's GPUs have; lower them"
            )
        return _group({"GPU": share}, workers, *({"GPU": gpu} for gpu in server))


def _group(bundle: dict[str, float], count: int, *first: dict[str, float]) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([{}, *first, *[bundle] * count])


def _perform_trial(
    config: dict[str, Any],
    *,
    sweep: SweepConfig,
    out: Path,
    marked: str,
    variables: dict[str, str],
    remote: RemoteStudy | None,
    alone: bool,
) -> None:
    """In the trial's process: run or resume the trial, and report its rounds, including those from before a kill.

    The last round is reported after everything is written, so a scheduler never stops a trial that is all but finished.
    """
    os.environ |= variables
    use_code(out / CODE)
    check_mark(out / "trials", marked)
    trial = _trial(sweep, out, _decode(sweep, config))
    last = trial.config.num_rounds

    def report(rounds: pd.DataFrame) -> None:
        for round, row in rounds.iterrows():
            tune.report({ROUND: round, **row.to_dict()})

    class Reporter(Observer):
        name = "Ray Tune"

        def round_ends(self, commit: Commit) -> None:
            if commit.metrics and commit.summary.round < last:
                report(trial.rounds().loc[[commit.summary.round]])

    # Waits for the process of a killed sweep, which may take a moment to end, and for a trial with equal settings.
    with held(out / "trials" / f".{trial.name}.lock", trial.folder, wait=True):
        if trial.has_results:
            report(trial.rounds().loc[: last - 1])
        perform(trial, Reporter(), alone=alone, remote=remote)
    report(trial.rounds().loc[[last]])


class _Listed(Searcher):
    """A searcher that suggests a list of points, one after the other."""

    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self._points = iter(points)

    def suggest(self, trial_id: str) -> Any:
        return next(self._points, Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass


def _searcher(sweep: SweepConfig, todo: Sequence[Trial], done: Sequence[Trial]) -> Searcher:
    if sweep.search != "optuna":
        return _Listed([_encode(trial.point) for trial in todo])
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, Any] = {}
    for key, axis in sweep.space.items():
        if axis.choice:
            space[key] = tune.choice([_encode_value(value) for value in axis.choice])
        elif axis.randint:
            space[key] = tune.randint(*axis.randint)
        elif axis.bounds:
            space[key] = (tune.loguniform if axis.loguniform else tune.uniform)(*axis.bounds)
    # Another seed after each resume: with the same one, points that are done would be proposed again.
    seed = int(np.random.SeedSequence([sweep.seed, len(done)]).generate_state(1)[0])
    search = OptunaSearch(
        space=OptunaSearch.convert_search_space(space),
        metric=sweep.metric,
        mode=_mode(sweep),
        points_to_evaluate=[_encode(trial.point) for trial in todo],
        seed=seed,
    )
    for trial in done:
        search.add_evaluated_point(_encode(trial.point), float(trial.rounds()[sweep.metric].iloc[-1]))
    return search


def _scheduler(sweep: SweepConfig, done: Sequence[Trial]) -> TrialScheduler | None:
    if sweep.scheduler == "none":
        return None
    num_rounds = max(sweep.configure(point).num_rounds for point in [sweep.first(), *sweep.points()])
    asha = sweep.asha
    scheduler = ASHAScheduler(
        time_attr=ROUND,
        metric=sweep.metric,
        mode=_mode(sweep),
        max_t=num_rounds,
        grace_period=min(asha.grace_rounds, num_rounds),
        reduction_factor=asha.reduction_factor,
    )
    for trial in done:
        past: Any = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(None, past)  # type: ignore[arg-type]
        for round, row in trial.rounds().iterrows():
            result = {ROUND: round, sweep.metric: row[sweep.metric]}
            scheduler.on_trial_result(None, past, result)  # type: ignore[arg-type]
    return scheduler


class _Progress(tune.Callback):
    """Says a line for each trial that ends, and records those that were stopped."""

    def __init__(
        self,
        sweep: SweepConfig,
        out: Path,
        done: int,
        total: int,
        say: Callable[[str], None],
        remote: RemoteStudy | None,
    ) -> None:
        self._sweep, self._out, self._done, self._total, self._say = sweep, out, done, total, say
        self._copying = Copying(remote) if remote else None
        self.failed = 0
        self._warned: set[str] = set()
        self._full = ""

    def check_storage(self) -> None:
        """Raise the StorageError with which a trial ended, if one did; others would end with it as well."""
        if self._full:
            raise StorageError(self._full)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = _trial(self._sweep, self._out, _decode(self._sweep, trial.config))
        warn_of_losses(ours.folder, self._warned, self._say)
        result = trial.last_result
        outcome = f"{self._sweep.metric} {result[self._sweep.metric]:.4g}"
        if not ours.finished:
            outcome += f", stopped after round {result[ROUND]}"
            names = sorted({*_stopped(self._sweep, self._out), ours.name})
            write_file(self._out / "stopped.json", json.dumps(names, indent=2) + "\n")
            if self._copying:
                self._copying.copy()
        self._tell(ours, f"{outcome} ({result['time_total_s']:.0f} s)")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.failed += 1
        lines = Path(trial.error_file).read_text(encoding="utf-8").split("\n") if trial.error_file else []
        said = next((line for line in reversed(lines) if line.strip()), "its process died")
        if said.startswith(kind := f"{StorageError.__module__}.{StorageError.__name__}: "):
            self._full = said.removeprefix(kind)
        self._tell(
            _trial(self._sweep, self._out, _decode(self._sweep, trial.config)),
            f"failed: {said.strip().removeprefix('semcons_ray.errors.')}",
        )

    def _tell(self, trial: Trial, outcome: str) -> None:
        self._done += 1
        self._say(f"[{self._done:>{len(str(self._total))}}/{self._total}] {trial.config.name}: {outcome}")


def read_results(sweep: SweepConfig, out: Path) -> SweepResult | None:
    """The results of the trials in a sweep's folder; None if none has any.

    Raises:
        RunFolderError: A table is missing or damaged; the message names the file.
    """
    stopped = _stopped(sweep, out)
    trials = _trials(sweep, out)
    if not any(trial.has_results for trial in trials):
        return None
    rows = []
    for trial in trials:
        status = "finished" if trial.finished else "stopped" if trial.name in stopped else "unfinished"
        last: dict[str, Any] = {"rounds": 0, "failed": 0, "energy_source": "unavailable"}
        if trial.has_results:
            rounds = trial.rounds()
            last = {"rounds": rounds.index[-1]} | {str(name): value for name, value in rounds.iloc[-1].items()}
        rows.append({"trial": trial.name, **_encode(trial.point), "status": status, **last})
    return SweepResult(
        name=sweep.name,
        keys=tuple(sweep.space),
        metric=sweep.metric,
        higher_is_better=sweep.higher_is_better,
        loss=comparable_loss(model for trial in trials for model in trial.config.scored_models),
        trials=pd.DataFrame(rows).sort_values(sweep.metric, ascending=not sweep.higher_is_better, kind="stable"),
    )


def _write_results(sweep: SweepConfig, out: Path) -> SweepResult | None:
    result = read_results(sweep, out)
    if not result:
        return None
    write_file(out / "trials.csv", result.trials.to_csv(index=False))
    write_file(out / "trials.parquet", result.trials.to_parquet(index=False))
    write_sweep_report(result, (out / "sweep.yaml").read_text(encoding="utf-8"), out / "report.html")
    return result


def _stopped(sweep: SweepConfig, out: Path) -> list[str]:
    """Names of the trials that the scheduler stopped; none if the sweep has no scheduler now, so that they continue."""
    path = out / "stopped.json"
    if sweep.scheduler == "none" or not path.is_file():
        return []
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except ValueError as error:
        raise SemconsError(f"{path} is damaged; delete it, and the trials that it names go on") from error


def _mode(sweep: SweepConfig) -> str:
    return "max" if sweep.higher_is_better else "min"


def _name(sweep: SweepConfig, trial: Any) -> str:
    return trial_name(_decode(sweep, trial.config))


def _encode_value(value: Any) -> Any:
    return label(value) if isinstance(value, (dict, list)) else value


def _encode(point: Point) -> dict[str, Any]:
    """A point as Tune and its loggers accept it: mappings and lists become text."""
    return {key: _encode_value(value) for key, value in point.items()}


def _decode(sweep: SweepConfig, config: dict[str, Any]) -> Point:
    texts = {key: {_encode_value(value): value for value in axis.values} for key, axis in sweep.space.items()}
    return {key: texts[key].get(config[key], config[key]) for key in sweep.space}
