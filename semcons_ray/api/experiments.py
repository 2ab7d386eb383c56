"""What one can do with experiments: the functions that the command line calls, too.

Settings are given as a path to a YAML file, as a nested mapping, as an `ExperimentConfig`, or as several of these, each
laid over those before it. Torch, Ray and the models are imported when they are needed.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from semcons_ray.api.places import local_folder, new_folder
from semcons_ray.config import ExperimentConfig, FederationConfig, Layer, Source, load_config, load_federation
from semcons_ray.errors import SemconsError, UserError

if TYPE_CHECKING:
    from semcons_ray.api.results import Comparison, DryRun, Run, Sweep
    from semcons_ray.runs.forecast import Forecast
    from semcons_ray.runs.observers import Observer
    from semcons_ray.security.audit import Audit
    from semcons_ray.studies.attacks import Attacks
    from semcons_ray.studies.break_even import BreakEven
    from semcons_ray.studies.comparison import ComparisonConfig
    from semcons_ray.studies.labels import Labels
    from semcons_ray.studies.replays import Replays
    from semcons_ray.studies.search_space import SweepConfig

logger = logging.getLogger(__name__)

Kind = Literal["run", "compare", "sweep"]

RULES = ("medoid", "plurality {min_cosine: 0.95}", "plurality {min_cosine: 1.0}")
"""Rules of which `labels` makes a table unless others are given."""

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of malicious clients that `attack` tries unless others are given."""


def run(config: Source = None, *, out: str | Path | None = None, observers: Iterable[Observer] = ()) -> Run:
    """Run an experiment; everything that it writes goes to a new folder.

    It works in a thread, in a running event loop, which it blocks, and in a Ray cluster to which the process is
    connected already. A process does one run at a time. If a run fails, the error has a note with its folder.

    Args:
        config: Settings, see this module; None: the defaults.
        out: The new folder, or a URL to which it is copied after each round; None: a folder of its own in runs/.
        observers: Are told of the progress.

    Raises:
        UserError: Something in the config, the data, the models, the cluster or the folder must be changed.
        QuorumError: Too few clients answered; `resume` goes on from the last round.
    """
    settings = load_config(config)
    from semcons_ray.api.results import Run
    from semcons_ray.runs.experiment import run_experiment
    from semcons_ray.runs.remote_folder import copying, locate

    place = new_folder(settings.name) if out is None else out
    folder, remote = locate(place, new=True)
    with _naming(place, folder):
        run_experiment(settings, folder, *copying(remote), *observers)
        done = Run(folder, remote)
        done.write_report()
    return done


def resume(place: str | Path, *, observers: Iterable[Observer] = ()) -> Run:
    """Continue a run that was stopped or failed; its numbers stay the same.

    Args:
        place: The run's folder, or its URL.
        observers: Are told of the progress.

    Raises:
        RunFolderError: It is no run folder, is damaged, or is in use; or settings in its config.yaml were changed that
            decide the run's numbers.
        UserError: See `run`.
        QuorumError: See `run`.
    """
    from semcons_ray.api.results import Run
    from semcons_ray.runs.experiment import resume_experiment
    from semcons_ray.runs.remote_folder import copying, locate

    folder, remote = locate(place)
    with _naming(place, folder):
        resume_experiment(folder, *copying(remote), *observers)
        done = Run(folder, remote)
        done.write_report()
    return done


def compare(
    config: Source | ComparisonConfig = None,
    *,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Run algorithms on the same data, seeds, models and budget: quality against bytes, seconds and joules.

    What is finished in the folder is not run again.

    Args:
        config: Settings of a comparison, or of an experiment, which is then run with all default arms.
        out: A new folder, or that of the same comparison, or a URL to which each run is copied after each round; None:
            a folder of its own in runs/.
        say: Called with a line for each run that ends; None: the lines are logged.

    Returns:
        The comparison, in which `failed` counts the runs that failed; the same call goes on with these.

    Raises:
        UserError: A setting is refused, or the folder holds something else; then nothing has been run.
        StorageError: The disk is full, or cannot be written to.
    """
    from semcons_ray.api.results import Comparison
    from semcons_ray.runs.remote_folder import locate_study
    from semcons_ray.studies.comparison import RUNS, SETTINGS, run_comparison
    from semcons_ray.studies.replays import write_virtual_time

    wanted = _comparison(config)
    place = out or new_folder(wanted.name)
    folder, remote = locate_study(place, SETTINGS, RUNS)
    _, failed = run_comparison(wanted, folder, say or logger.info, remote)
    _tell_failed(failed, "runs", place, say)
    if found := write_virtual_time(folder):
        (say or logger.info)(f"their virtual hours, joules and CO2: {found}")
    if remote:
        remote.copy()
    return Comparison(folder, failed)


def sweep(
    config: Source | SweepConfig,
    *,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Try many settings with Ray Tune: quality against bytes, seconds and joules, and the effect of each.

    What is finished in the folder is not run again.

    Args:
        config: Settings of a sweep.
        out: A new folder, or that of the same sweep, or a URL to which each trial is copied after each round; None: a
            folder of its own in runs/.
        say: Called with a line for each trial that ends; None: the lines are logged.

    Returns:
        The sweep, in which `failed` counts the trials that failed; the same call goes on with these.

    Raises:
        UserError: A setting is refused, or the folder holds something else; then nothing has been run.
        StorageError: The disk is full, or cannot be written to.
    """
    wanted = _sweep(config)
    from semcons_ray.api.results import Sweep
    from semcons_ray.runs.remote_folder import locate_study
    from semcons_ray.studies.replays import write_virtual_time
    from semcons_ray.studies.sweep import SETTINGS, TRIALS, run_sweep

    place = out or new_folder(wanted.name)
    folder, remote = locate_study(place, SETTINGS, TRIALS)
    _, failed = run_sweep(wanted, folder, say or logger.info, remote)
    _tell_failed(failed, "trials", place, say)
    if found := write_virtual_time(folder):
        (say or logger.info)(f"their virtual hours, joules and CO2: {found}")
    if remote:
        remote.copy()
    return Sweep(folder, failed)


def load(place: str | Path) -> Run | Comparison | Sweep:
    """The run, the comparison or the sweep in a folder or at a URL.

    Raises:
        RunFolderError: There is none, or it cannot be read.
    """
    from semcons_ray.api.results import Comparison, Run, Sweep
    from semcons_ray.runs.remote_folder import locate

    folder, remote = locate(place)
    if (folder / "comparison.yaml").is_file():
        return Comparison(folder)
    if (folder / "sweep.yaml").is_file():
        return Sweep(folder)
    return Run(folder, remote)


def plan(
    config: Source | ComparisonConfig | SweepConfig = None,
    kind: Kind = "run",
    *,
    out: str | Path | None = None,
    observers: Iterable[Observer] = (),
) -> DryRun:
    """Say what a run, a comparison or a sweep would do: data, placement, bytes, tokens, hours. Nothing is run or kept.

    Data is read and divided, models are found and checked, and everything is placed, as a run does it, so what a run
    would refuse is refused.

    Args:
        config: Settings of what `kind` says.
        kind: "run", "compare" or "sweep".
        out: The folder or URL; that of a run is only checked to be free.
        observers: Are told of the stages.

    Raises:
        UserError: It would be refused.
    """
    from semcons_ray.runs.remote_folder import RemoteFolder, is_url

    if kind == "run":
        return _plan_run(config, out, observers)
    if out and is_url(out):
        RemoteFolder(str(out))  # which refuses what it cannot use
    if kind == "compare":
        from semcons_ray.studies.comparison import plan_runs

        wanted = _comparison(config)
        runs = plan_runs(wanted, Path(out or ""))[: len(wanted.arms)]
        return _plan_many([(run.arm, run.config) for run in runs], len(wanted.seeds), observers)
    from semcons_ray.studies.search_space import describe_point

    tried = _sweep(config)
    points = tried.points()  # none if they are chosen as the sweep goes: then the first stands for all
    labelled = [(describe_point(point), tried.configure(point)) for point in points or [tried.first()]]
    return _plan_many(labelled, 1 if points else tried.num_samples, observers)


def evaluate(
    place: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Measure a finished run's base models and adapters by tasks of lm-eval, into its metrics and report.

    Args:
        place: The run's folder, or its URL.
        tasks: Tasks, groups or tags of lm-eval, or YAML files.
        limit: Only the first items of each task, this many; None: all.
        say: Called with a line for each model before it is measured; None: the lines are logged.

    Raises:
        RunFolderError: It is no folder of a run that is finished, or is in use.
        ConfigError: lm-eval is not installed, does not know a task, or lacks its data; or the run's GPU is not there.
        ModelError: A model cannot be found or loaded.
    """
    from semcons_ray.api.results import Run
    from semcons_ray.runs.own_process import as_found
    from semcons_ray.runs.remote_folder import locate
    from semcons_ray.runs.tasks import evaluate_run

    folder, remote = locate(place)
    with as_found():
        evaluate_run(folder, tasks, limit, say or logger.info)
    done = Run(folder, remote)
    done.write_report()
    return done


def audit(place: str | Path, *, say: Callable[[str], None] | None = None) -> Audit:
    """Look in a finished run for private text: in answers, pseudo-labels and models; writes audit/ in its folder.

    Args:
        place: The run's folder, or its URL.
        say: Called with a line before each step that takes long; None: the lines are logged.

    Raises:
        RunFolderError: It is no folder of a run that is finished.
        UserError: Nothing is held out that private examples could be compared with.
        ConfigError: The run's GPU is not there.
        ModelError: A model cannot be found or loaded.
    """
    from semcons_ray.runs.own_process import as_found
    from semcons_ray.runs.remote_folder import locate
    from semcons_ray.security.audit import audit_run

    folder, remote = locate(place)
    with as_found():
        found = audit_run(folder, say or logger.info)
    if remote:
        remote.copy()
    return found


def labels(
    *places: str | Path,
    rules: Sequence[str] = RULES,
    competences: Sequence[str] | None = None,
    defences: Sequence[str] = ("none",),
    num_samples: Sequence[int] = (),
) -> Labels:
    """Count the labels that each rule and competence gets right, from answers that runs have stored.

    Nothing is trained. Every rule is tried with every competence, defence and number of samples; what else an election
    needs is set as in the first run.

    Args:
        places: Folders or URLs of runs, which differ in their seeds only.
        rules: Names of rules; one with options is "plurality {min_cosine: 0.95}".
        competences: The same for competences; None: all that are built in.
        defences: The same for defences.
        num_samples: How many of a client's samples to use, the first ones; none: 1, 2, 4 and so on, and all.

    Raises:
        RunFolderError: One is no run folder, or a file of it is missing or damaged.
        UserError: A run has no answers, or no public prompt of it has a response; or clients drew fewer samples; or
            runs differ not only in their seeds.
        ConfigError: There is no such part, or it refuses its options.
        ModelError: A run's embedder cannot be loaded.
    """
    from semcons_ray.runs.own_process import as_found
    from semcons_ray.runs.remote_folder import locate
    from semcons_ray.studies.labels import check_seeds, elections, label_table, read_answered

    if not places:
        raise UserError("labels needs the folder of a run")
    folders = [locate(place)[0] for place in places]
    ways = elections(check_seeds(folders), rules, competences, defences)
    with as_found():
        return label_table([read_answered(folder) for folder in folders], ways, num_samples)


def attack(
    *places: Layer,
    rules: Sequence[str] = (),
    defences: Sequence[str] = ("none", "independent"),
    attacks: Sequence[str] = (),
    shares: Sequence[float] = SHARES,
    seeds: Sequence[int] = (0,),
    learn: bool = False,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Attacks:
    """Add malicious clients to the stored answers of runs, and see how many labels they capture, by rule and defence.

    Honest clients are those of the runs; attackers come in addition. What else an election needs is set as in the first
    run. Nothing is trained, unless an experiment is given, or honest clients shall learn the labels.

    Args:
        places: Folders or URLs of runs, which differ in their seeds only; or settings of an experiment, to be run
            first, in honest/ of `out`. What is finished there is not run again.
        rules: Names of rules; one with options is "plurality {min_cosine: 0.95}". None: the rule of the first run.
        defences: The same for defences.
        attacks: The same for attacks; none: all that have a name.
        shares: Which shares of all clients are malicious, above 0 and under 1. Their number is rounded; a share of
            which no client is left is not tried, and `say` is told.
        seeds: With which an experiment is run.
        learn: Whether the runs go on for one more round, in learnt/ of `out`, with the labels that a backdoor led to,
            and with those without attackers, to see how often models answer test prompts as the attackers want. What
            is there already is not done again. Clients must answer in the last round
            (`algorithm.answer_last_round`).
        out: A folder for the table and the figure, see `Attacks.write`; None: nothing is written.
        say: Called with a line for each way of electing that is done with a run; None: the lines are logged.

    Raises:
        RunFolderError: One is no run folder, or a file of it is missing or damaged.
        UserError: A run has no answers, or no public prompt of it has a response; or it cannot go on; or runs differ
            not only in their seeds; or `out` is missing.
        ConfigError: There is no such part, it refuses its options, or a share is out of range.
        ModelError: A run's embedder cannot be loaded.
        StorageError: The disk is full, or cannot be written to.
        SemconsError: A run of the experiment failed; `say` was told why.
    """
    from semcons_ray.runs.own_process import as_found
    from semcons_ray.runs.remote_folder import locate
    from semcons_ray.studies.attacks import (
        attack_table,
        check_goals,
        check_shares,
        learner,
        make_attacks,
        ways_to_elect,
    )
    from semcons_ray.studies.labels import check_seeds, read_answered
    from semcons_ray.studies.learning import check_answers_last

    say, made = say or logger.info, make_attacks(attacks)
    if learn:
        check_goals(made.values())
    stored = [place for place in places if isinstance(place, str | Path) and not Path(place).is_file()]
    if not places or 0 < len(stored) < len(places):
        raise UserError("attack needs folders of runs, or settings of an experiment")
    if out is None and (learn or not stored):
        raise UserError("attack needs a folder for what it runs: out")
    folder = Path() if out is None else local_folder(out)
    folders = [locate(place)[0] for place in stored]
    settings = check_seeds(folders) if stored else load_config(places)
    ways = ways_to_elect(settings, rules, defences)
    check_shares(shares, settings.clients.num_clients)
    if not stored:
        if learn:
            check_answers_last(settings, "the experiment")
        honest = compare([*places, {"seeds": [*seeds], "arms": {"honest": {}}}], out=folder / "honest", say=say)
        if honest.failed:
            raise SemconsError(f"{honest.failed} of {len(seeds)} runs failed; the same call goes on with these")
        folders = [run.path for run in honest.runs.values()]
    with as_found():
        learning = learner(folders, folder / "learnt", say) if learn else None
        found = attack_table([read_answered(one) for one in folders], ways, made, shares, say, learning)
    if out is not None:
        found.write(folder)
    return found


def replay(
    *places: str | Path,
    federation: str | Path | Mapping[str, Any] | FederationConfig | None = None,
    model: str | None = None,
) -> Replays:
    """Let the rounds of finished runs pass in a federation: its virtual hours, joules, grams of CO2 and bytes.

    Nothing is run again. What clients trained, wrote and sent is in the runs' ledgers; how long that takes is
    calculated from the profiles of the federation's devices and links. Losses are those of the runs, so where answers
    would count in other rounds than they did, as under another policy, what would have been learnt is not known.

    Args:
        places: Folders or URLs of runs, of comparisons or of sweeps.
        federation: The section `federation` of an experiment's settings: a YAML file that has it, or its settings;
            None: each run's own.
        model: Name of a model for whose size times and weights are calculated (`semcons show models`); None: the runs'
            own.

    Raises:
        RunFolderError: One is no such folder, no run of it is finished, or a file is missing or damaged.
        ConfigError: A setting of the federation is refused, a model does not fit on a device, nobody is ever there; or
            a run has no federation of its own, and none is given.
        UserError: No run is given.
    """
    from semcons_ray.runs.remote_folder import locate
    from semcons_ray.studies.replays import find_runs, replay_runs

    if not places:
        raise UserError("replay needs the folder of a run")
    if federation is not None and not isinstance(federation, FederationConfig):
        federation = load_federation(federation)
    return replay_runs(find_runs([locate(place)[0] for place in places]), federation, model)


def break_even(
    *places: str | Path,
    models: Sequence[str] | Mapping[str, str | None],
    links: Sequence[str] = (),
    federation: str | Path | Mapping[str, Any] | FederationConfig | None = None,
    arms: Sequence[str] = (),
    against: str | None = None,
) -> BreakEven:
    """Compare what finished runs' arms would take, over sizes of the model and over links: where one breaks even.

    Each arm of a comparison is replayed (see `replay`) with every model and link; all clients have the same.

    Args:
        places: Folders or URLs of runs, of comparisons or of sweeps.
        models: Names of models (`semcons show models`), or `own` for the runs' own; as a mapping, with the device that
            clients have with each. A device of None is that of the federation.
        links: Names of links; none: all of `semcons show links`.
        federation: The rest, as for `replay`; None: the defaults.
        arms: Arms that are compared with `against`; none: all.
        against: Arm with which the others are compared; None: the one that averages weights.

    Raises:
        RunFolderError: One is no such folder, no run of it is finished, or a file is missing or damaged.
        ConfigError: A setting of the federation is refused, a model does not fit on a device, or it is not clear what
            is compared with what.
        UserError: No run or no model is given.
    """
    from semcons_ray.runs.remote_folder import locate
    from semcons_ray.studies.break_even import break_even_of
    from semcons_ray.studies.replays import find_runs
    from semcons_ray.timeline.profiles import table

    if not places or not models:
        raise UserError("a break-even needs the folder of a comparison, and models")
    if not isinstance(federation, FederationConfig):
        federation = load_federation(federation) if federation is not None else FederationConfig()
    devices = models if isinstance(models, Mapping) else dict.fromkeys(models)
    found = find_runs([locate(place)[0] for place in places])
    return break_even_of(found, devices, [*dict.fromkeys(links or table("links"))], federation, arms, against)


def watch(folder: str | Path) -> bool:
    """Show a run that goes on in another process: each round that is done, until it ends.

    Returns:
        Whether the run is finished; else it has stopped before.

    Raises:
        UserError: It is no run folder, or one that is damaged.
    """
    from semcons_ray.reporting.watch import watch

    return watch(local_folder(folder))


def _plan_run(config: Any, out: str | Path | None, observers: Iterable[Observer]) -> DryRun:
    settings = load_config(config)
    from semcons_ray.api.results import DryRun
    from semcons_ray.reporting.forecast import loads_of_rounds, render_forecast
    from semcons_ray.runs.experiment import plan_experiment
    from semcons_ray.runs.forecast import Forecast, measure
    from semcons_ray.runs.observers import StagesOnly
    from semcons_ray.runs.own_process import as_found
    from semcons_ray.runs.remote_folder import check_free

    if out:
        check_free(out)
    told = StagesOnly(observers)
    with as_found():
        planned = plan_experiment(settings, told)
        told.stage("counting tokens")
        forecast = Forecast(planned)
        told.stage("measuring the speed of a batch")
        speed = measure(forecast)
    seconds = math.nan if isinstance(speed, str) else forecast.seconds(speed)
    table, operations = loads_of_rounds(forecast), forecast.operations
    return DryRun(table, operations, seconds, lambda: render_forecast(forecast, speed))


def _plan_many(runs: Sequence[tuple[str, ExperimentConfig]], times: int, observers: Iterable[Observer]) -> DryRun:
    from semcons_ray.api.results import DryRun
    from semcons_ray.reporting.forecast import loads_of_runs, render_forecasts
    from semcons_ray.runs.assembly import cluster
    from semcons_ray.runs.experiment import plan_experiment
    from semcons_ray.runs.forecast import Forecast, measure
    from semcons_ray.runs.observers import StagesOnly
    from semcons_ray.runs.own_process import as_found

    told = StagesOnly(observers)
    forecasts: dict[str, Forecast] = {}
    with as_found(), cluster(runs[0][1]) as nodes:
        for label, config in runs:
            told.stage(label)
            forecasts[label] = Forecast(plan_experiment(config, told, nodes))
        told.stage("measuring the speed of a batch")
        speed = measure(next(iter(forecasts.values())))
    each = forecasts.values()
    seconds = math.nan if isinstance(speed, str) else times * sum(one.seconds(speed) for one in each)
    operations = times * sum(one.operations for one in each)
    table = loads_of_runs(forecasts, times)
    return DryRun(table, operations, seconds, lambda: render_forecasts(forecasts, times, speed))


def _comparison(config: Any) -> ComparisonConfig:
    from semcons_ray.studies.comparison import ComparisonConfig, load_comparison

    return config if isinstance(config, ComparisonConfig) else load_comparison(config)


def _sweep(config: Any) -> SweepConfig:
    from semcons_ray.studies.search_space import SweepConfig, load_sweep

    if isinstance(config, SweepConfig):
        config.check()
        return config
    return load_sweep(config)


@contextlib.contextmanager
def _naming(place: str | Path, folder: Path) -> Iterator[None]:
    """Note on an error that ends the block in which folder the run is, if it has begun."""
    try:
        yield
    except BaseException as error:
        if (folder / "config.yaml").is_file():
            error.add_note(f"The run's folder is {place}; semcons_ray.resume({str(place)!r}) goes on with it.")
        raise


def _tell_failed(failed: int, what: str, place: str | Path, say: Callable[[str], None] | None) -> None:
    """Warn of failures, which nobody was told of but the log."""
    if failed and say is None:
        logger.warning("%d %s failed, as the log says; the same call with out=%r goes on", failed, what, str(place))
