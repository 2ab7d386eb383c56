"""Finished runs in a federation, side by side: of one run, of a comparison's arms and seeds, or of a sweep's trials."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from semcons_ray.config import FederationConfig
from semcons_ray.errors import ConfigError, RunFolderError
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.reporting.replay import CALCULATED, Recorded, Replay, replay
from semcons_ray.reporting.tables import read_metrics, telling
from semcons_ray.reporting.virtual_time import describe_federation, render_replays, write_gantt, write_quality
from semcons_ray.runs.run_folder import Loss, RunFolder, comparable_loss, write_file
from semcons_ray.studies.comparison import finished_runs, load_comparison

logger = logging.getLogger(__name__)

VIRTUAL_TIME = "virtual_time"
"""Folder of a study with the replays of its runs."""


class Place(NamedTuple):
    """Where a finished run is.

    Attributes:
        arm: What it is called together with those that differ from it in their seeds only.
        folder: Its folder.
    """

    arm: str
    folder: Path


@dataclass(frozen=True, eq=False)
class Replays:
    """Finished runs in a federation; `semcons_ray.replay` returns it.

    Attributes:
        runs: Each run's replay, by arm and seed.
        algorithms: Each arm's algorithm.
        loss: The loss by which runs are compared.
        setting: The federation, in a line.
    """

    runs: Mapping[tuple[str, int], Replay]
    algorithms: Mapping[str, str]
    loss: Loss
    setting: str

    def __str__(self) -> str:
        """The summary as text, as wide as the terminal."""
        return render_replays(self.summary, self.sources, self.loss, f"{self.setting}.")

    @property
    def sources(self) -> Mapping[str, str]:
        """For each column that is not calculated, whether it is measured or scaled; or both, of different runs."""
        columns = dict.fromkeys(name for one in self.runs.values() for name in one.sources)
        return {
            name: " or ".join(sorted({one.sources.get(name, CALCULATED) for one in self.runs.values()}))
            for name in columns
        }

    @cached_property
    def totals(self) -> pd.DataFrame:
        """A row for each run: arm, algorithm, seed, virtual hours, joules by what they were for and together, grams of
        CO2, bytes, and the loss after the last round."""
        rows = [
            {"arm": arm, "algorithm": self.algorithms[arm], "seed": seed, **one.totals}
            for (arm, seed), one in self.runs.items()
        ]
        return pd.DataFrame(rows)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row for each arm: means over its runs, how many these are, and half widths of 95% t-intervals in columns
        that end in _half_width, NaN for one run."""
        rows = {}
        for arm, group in self.totals.groupby("arm", sort=False):
            rows[arm] = {"algorithm": self.algorithms[str(arm)], "runs": len(group)}
            for name in group.columns.drop(["arm", "algorithm", "seed"]):
                rows[arm][name], rows[arm][f"{name}_half_width"] = mean_and_half_width(group[name].to_numpy())
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    @property
    def rounds(self) -> pd.DataFrame:
        """A row for each run and round; see `Replay.rounds`."""
        return self._together("rounds")

    @property
    def visits(self) -> pd.DataFrame:
        """A row for each run and visit; see `Replay.visits`."""
        return self._together("visits")

    def hours_to(self, loss: float) -> pd.Series[float]:
        """Virtual hours until each run's loss is as low as this, by arm and seed; NaN if it never is."""
        hours = {key: one.hours_to(loss) for key, one in self.runs.items()}
        return pd.Series(hours, dtype="float64").rename_axis(["arm", "seed"])

    def write(self, folder: Path) -> None:
        """Write rounds.csv, visits.parquet and totals.csv, which tell in the name of each column where it is from.

        With one run also the figure timeline, who did what when; with several quality, their loss against what they
        cost, and hours, their loss by virtual time. Each is a .svg and a .png.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "totals.csv", self._marked(self.totals).to_csv(index=False))
        write_file(folder / "rounds.csv", self._marked(self.rounds).to_csv(index=False))
        write_file(folder / "visits.parquet", bytes(self._marked(self.visits).to_parquet(index=False)))
        if len(self.runs) == 1:
            ((arm, _), done), = self.runs.items()
            write_gantt(done, arm, folder)
        else:
            write_quality(self.summary, self._curves(), self.loss, self.setting, folder)

    def _together(self, name: str) -> pd.DataFrame:
        tables: dict[tuple[str, int], pd.DataFrame] = {run: getattr(one, name) for run, one in self.runs.items()}
        return pd.concat(tables, names=["arm", "seed"]).reset_index(["arm", "seed"]).reset_index(drop=True)

    def _marked(self, table: pd.DataFrame) -> pd.DataFrame:
        keys = ("arm", "algorithm", "seed", "device", "link")  # say which run and client it is
        numbers = [name for name in map(str, table) if name not in keys]
        return table.rename(columns={name: f"{name} [{self.sources.get(name, CALCULATED)}]" for name in numbers})

    def _curves(self) -> pd.DataFrame:
        """Means over each arm's runs of hours and loss after each round, from the base model on."""
        rows = [
            {"arm": arm, "round": 0, "hours": 0.0, "loss": one.base_loss} for (arm, _), one in self.runs.items()
        ]
        table = pd.concat([pd.DataFrame(rows), self.rounds[["arm", "round", "hours", "loss"]]])
        return table.groupby(["arm", "round"])[["hours", "loss"]].mean().reset_index()


def replay_runs(places: Sequence[Place], federation: FederationConfig | None, model: str | None) -> Replays:
    """Let finished runs' rounds pass in a federation; see `replay`.

    Args:
        places: The runs.
        federation: The federation; None: each run's own.
        model: Name of a model for whose size times and weights are calculated; None: the runs' own.

    Raises:
        RunFolderError: A run is not finished, or a file of it is missing or damaged.
        ConfigError: See `replay`; or a run has no federation of its own, and none is given.
    """
    loss = loss_of(places)
    done: dict[tuple[str, int], Replay] = {}
    algorithms, settings = {}, set()
    for arm, folder in places:
        run = Recorded.read(folder, loss)
        own = federation or run.config.federation
        if not own.devices and federation is None:
            raise ConfigError(f"{folder} has no federation.devices of its own; give a file that has, by --federation")
        done[arm, run.config.seed] = replay(run, own, model)
        algorithms[arm] = run.config.algorithm.name
        settings.add(describe_federation(own.model_copy(update={"model": model or own.model})))
    return Replays(done, algorithms, loss, settings.pop() if len(settings) == 1 else "Each run in its own federation")


def loss_of(places: Sequence[Place]) -> Loss:
    """The loss by which runs can be compared.

    Raises:
        RunFolderError: A file of a run is missing or damaged.
    """
    metrics = [read_metrics(place.folder) for place in places]
    return comparable_loss(itertools.chain(*(telling(table, "nll")["model"] for table in metrics)))


def write_virtual_time(folder: Path) -> Path | None:
    """Write the replays of a study's finished runs, each in its own federation, into the study's folder; see
    `Replays.write`.

    Args:
        folder: A comparison's or a sweep's folder.

    Returns:
        The folder with the replays; None if no run is finished, one has no federation, or it cannot be had any more, as
        where a trace file is gone, which is said in the log: what was run is not lost by it.
    """
    runs, _ = _of_study(folder)
    if not runs or not all(RunFolder(run.folder).stored_config().federation.devices for run in runs):
        return None
    try:
        replays = replay_runs(runs, None, None)
    except (ConfigError, RunFolderError) as error:
        logger.warning("there is no virtual time of %s: %s", folder, error)
        return None
    replays.write(folder / VIRTUAL_TIME)
    return folder / VIRTUAL_TIME


def find_runs(folders: Sequence[Path]) -> list[Place]:
    """The finished runs of folders, each of a run, a comparison or a sweep.

    Raises:
        RunFolderError: One has no finished run, or is none of these.
    """
    several = len(folders) > 1
    return [
        Place(f"{folder}: {arm}" if several and arm else arm or str(folder), run)
        for folder in folders
        for arm, run in _runs(folder)
    ]


def _runs(folder: Path) -> list[Place]:
    """The finished runs of a folder; the arm of a run by itself is not named."""
    if not any((folder / name).is_file() for name in ("comparison.yaml", "sweep.yaml")):
        return [Place("", folder)]
    runs, total = _of_study(folder)
    if not runs:
        raise RunFolderError(f"{folder}: none of its runs is finished")
    if len(runs) < total:
        logger.warning("%s: %d of %d runs are not finished, and left out", folder, total - len(runs), total)
    return runs


def _of_study(folder: Path) -> tuple[list[Place], int]:
    """The finished runs of a comparison or a sweep, and how many it has."""
    if (folder / "comparison.yaml").is_file():
        comparison = load_comparison(folder / "comparison.yaml")
        runs = [Place(run.arm, run.folder) for run in finished_runs(comparison, folder)]
        return runs, len(comparison.arms) * len(comparison.seeds)
    trials = [path.parent for path in sorted(folder.glob("trials/[!.]*/config.yaml"))]
    return [Place(path.name, path) for path in trials if _is_finished(path)], len(trials)


def _is_finished(folder: Path) -> bool:
    opened = RunFolder(folder)
    return opened.is_finished(opened.stored_config().num_rounds)
