"""Comparisons: arms, which are algorithms with their settings, run with the same seeds, data, models and budget.

A comparison's folder:

    comparison.yaml         what is compared, with every default written out
    runs/ARM/seed_N/        a run folder for each arm and seed; see runs/run_folder.py
    rounds.csv, summary.csv, stages.csv, metrics.csv    see reporting/comparison.py
    table.md, pareto.svg, pareto.png       the summary as a table and a figure
    environment.json        versions and machine of the first run
    virtual_time/           where all runs have a virtual clock: their replays; see studies/replays.py

The same command again continues with what is not finished; arms and seeds may be added or removed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from semcons_ray.config import Section, Settings, Source, dump_yaml, merge_settings, validate_shared
from semcons_ray.errors import RunFolderError, SemconsError, StorageError
from semcons_ray.reporting.comparison import Comparison, compare_runs
from semcons_ray.reporting.pareto import write_pareto
from semcons_ray.reporting.summary import summary_markdown
from semcons_ray.reporting.tables import mean_by_round, read_table
from semcons_ray.runs.remote_folder import RemoteStudy
from semcons_ray.runs.run_folder import LOSS_NAMES, MetricsRow, columns_of, comparable_loss, write_file
from semcons_ray.runs.trackers import check_trackers
from semcons_ray.studies.batch import Job, configure_runs, load_study, run_jobs, slug, warn_of_losses

SETTINGS, RUNS = "comparison.yaml", "runs/*/*"
"""The file with a comparison's settings, and a pattern of its run folders."""

DEFAULT_ARMS: dict[str, dict[str, Any]] = {
    "semantic consensus": {},
    "local only": {"algorithm": {"name": "local_only"}},
    "FedAvg-LoRA": {"algorithm": {"name": "fedavg_lora"}},
    "FedProx": {"algorithm": {"name": "fedprox"}},
    "SCAFFOLD": {"algorithm": {"name": "scaffold"}},
    "FFA-LoRA": {"algorithm": {"name": "ffa_lora"}},
    "FLoRA": {"algorithm": {"name": "flora"}},
    "FlexLoRA": {"algorithm": {"name": "flexlora"}},
    "HetLoRA": {"algorithm": {"name": "hetlora"}},
    "one-shot FedAvg-LoRA": {"algorithm": {"name": "one_shot_fedavg_lora"}},
    "centralized": {"algorithm": {"name": "centralized"}},
    "FedAvg-LoRA + own labels": {"algorithm": {"name": "fedavg_lora", "self_labels": True}},
    "local only, not averaged": {"algorithm": {"name": "local_only", "ema_decay": 0.0}},
    "self-training": {"algorithm": {"rule": "own_answer"}},
    "random client": {"algorithm": {"rule": "random_client"}},
    "longest answer": {"algorithm": {"rule": "longest"}},
    "shortest answer": {"algorithm": {"rule": "shortest"}},
    "reference answers": {"algorithm": {"rule": "reference"}},
}
"""The arms that are compared if none are given: algorithms first, then controls."""


class ComparisonConfig(Settings):
    """The settings of a comparison.

    Attributes:
        name: A title for the table and the figure.
        seeds: Each arm is run with each of these seeds.
        reference: The arm at which "gap closed" is 100%.
        baseline: The arm at which "gap closed" is 0%.
        experiment: Settings of all runs; what is left out has its default.
        arms: By label, the settings in which each arm differs from `experiment`. Others are compared with the first
            arm.
    """

    name: str = "comparison"
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    reference: str = "FedAvg-LoRA"
    baseline: str = "local only"
    experiment: Section = Field(default_factory=dict)
    arms: dict[str, Section] = Field(DEFAULT_ARMS, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {', '.join(map(str, self.seeds))} name a seed twice")
        for key in ("reference", "baseline"):
            if key in self.model_fields_set and (arm := getattr(self, key)) not in self.arms:
                raise ValueError(f"{key} '{arm}' is not among the arms, {', '.join(self.arms)}")
        folders: dict[str, str] = {}
        for arm, settings in self.arms.items():
            if not slug(arm):
                raise ValueError(f"arms.{arm}: a label needs letters or digits")
            if (other := folders.setdefault(slug(arm), arm)) != arm:
                raise ValueError(f"arms.{arm} and arms.{other} would share a folder; rename one")
            if "seed" in settings:
                raise ValueError(f"arms.{arm}.seed: all arms have the same; give seeds")
        if (seed := self.experiment.get("seed", 0)) not in (0, *self.seeds):
            raise ValueError(f"experiment.seed is {seed}, which is not among the seeds; change seeds instead")
        return self


@dataclass(frozen=True)
class ArmRun(Job):
    """One run of a comparison."""

    arm: str
    seed: int


def load_comparison(source: Source, overrides: dict[str, Any] | None = None) -> ComparisonConfig:
    """Read a comparison; settings of an experiment alone are compared over the default arms. See `batch.load_study`.

    Args:
        source: Where settings are read from; None: the default experiment and arms.
        overrides: Settings that replace those of the experiment.

    Raises:
        ConfigError: A file is missing or not YAML, or a key or value is refused; the message names the key.
    """
    return load_study(ComparisonConfig, source, overrides)


def plan_runs(comparison: ComparisonConfig, out: Path) -> list[ArmRun]:
    """All runs of a comparison in order: all arms with one seed before the next seed.

    Raises:
        ConfigError: A setting is refused; the message names the arm and the key.
    """
    arms = [
        (f"arm '{arm}'", merge_settings(settings, {"name": f"{arm}, seed {seed}", "seed": seed}), arm, seed)
        for seed in comparison.seeds
        for arm, settings in comparison.arms.items()
    ]
    configs = configure_runs(comparison.experiment, [(where, settings) for where, settings, _, _ in arms])
    return [
        ArmRun(config, out / "runs" / slug(arm) / f"seed_{seed}", arm, seed)
        for config, (_, _, arm, seed) in zip(configs, arms, strict=True)
    ]


def run_comparison(
    comparison: ComparisonConfig, out: Path, say: Callable[[str], None], remote: RemoteStudy | None = None
) -> tuple[Comparison | None, int]:
    """Do the runs that are not finished, and write the results of all.

    Args:
        comparison: What to compare.
        out: A new folder, or that of a comparison with the same settings.
        say: Called with a line for each run, and with errors.
        remote: Where it is kept as well; its runs are copied there as they go on.

    Returns:
        The comparison of the finished runs, None if there are none; and the number of runs that failed.

    Raises:
        UserError: A setting is refused, or `out` holds something else; then nothing has been run.
        StorageError: The disk is full, or cannot be written to.
    """
    runs = plan_runs(comparison, out)
    _check_folder(out, runs)
    check_trackers(*(run.config for run in runs))
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / SETTINGS, dump_comparison(comparison))
    if remote:
        remote.copy()
    todo = [run for run in runs if not run.finished]
    numbers = itertools.count(len(runs) - len(todo) + 1)
    failed = 0
    loss = comparable_loss(model for run in runs for model in run.config.scored_models)
    warned: set[str] = set()

    def report(run: ArmRun, seconds: Callable[[], float]) -> None:
        nonlocal failed
        try:
            outcome = f"({seconds():.0f} s)"
            metrics = read_table(run.folder / "metrics.parquet", columns_of(MetricsRow))
            mean = mean_by_round(metrics, loss)
            known = f"{LOSS_NAMES[loss]} {mean.iloc[-1]:.3f}" if len(mean) else "no likelihood is told"
            outcome = f"{known} {outcome}"
            warn_of_losses(run.folder, warned, say)
        except StorageError:  # other runs would fail in the same way
            raise
        except SemconsError as error:
            failed += 1
            outcome = f"failed: {' '.join(str(error).split())}"
        say(f"[{next(numbers):>{len(str(len(runs)))}}/{len(runs)}] {run.arm}, seed {run.seed}: {outcome}")

    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are finished")
    try:
        run_jobs(todo, report, remote)
    except StorageError:
        raise
    except SemconsError as error:
        failed += 1
        say(f"{error}; the same command goes on with what is left")
    return _write_results(comparison, out), failed


def dump_comparison(comparison: ComparisonConfig) -> str:
    """The comparison as YAML that `load_comparison` reads, with every default of the experiment written out."""
    values = comparison.model_dump(mode="json")
    for key in ("reference", "baseline"):
        if values[key] not in comparison.arms:
            del values[key]
    experiment = validate_shared(comparison.experiment, where="experiment", shared=comparison.experiment)
    values["experiment"] = experiment.model_dump(mode="json", exclude={"seed", "name"})
    return dump_yaml(values)


def _check_folder(out: Path, runs: Sequence[ArmRun]) -> None:
    if out.exists() and not (out / SETTINGS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty and holds no comparison; choose another --out")
    for run in runs:
        run.check_settings()


def finished_runs(comparison: ComparisonConfig, out: Path) -> list[ArmRun]:
    """The finished runs in a comparison's folder, in the order of the arms."""
    position = {arm: index for index, arm in enumerate(comparison.arms)}
    return sorted((run for run in plan_runs(comparison, out) if run.finished), key=lambda run: position[run.arm])


def read_results(comparison: ComparisonConfig, out: Path) -> Comparison | None:
    """The results of the finished runs in a comparison's folder; None if there are none.

    Raises:
        RunFolderError: A table is missing or damaged; the message names the file.
    """
    folders = {(run.arm, run.seed): run.folder for run in finished_runs(comparison, out)}
    landmarks = {"reference": comparison.reference, "baseline": comparison.baseline}
    return compare_runs(folders, first=next(iter(comparison.arms)), **landmarks) if folders else None


def _write_results(comparison: ComparisonConfig, out: Path) -> Comparison | None:
    result = read_results(comparison, out)
    if not result:
        return None
    write_file(out / "rounds.csv", result.rounds.to_csv(index=False))
    write_file(out / "summary.csv", result.summary.to_csv())
    write_file(out / "stages.csv", result.stages.to_csv())
    write_file(out / "metrics.csv", result.metrics.to_csv(index=False))
    landmarks = {"reference": comparison.reference, "baseline": comparison.baseline}
    text = summary_markdown(result.summary, comparison.name, metrics=result.metrics, **landmarks)
    write_file(out / "table.md", text)
    first = finished_runs(comparison, out)[0].folder
    write_file(out / "environment.json", (first / "environment.json").read_text(encoding="utf-8"))
    write_pareto(result.summary, comparison.name, out)
    return result
