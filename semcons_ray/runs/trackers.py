"""What trackers and Prometheus are told of a run: every number of its tables that is a measurement, by round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import pandas as pd

from semcons_ray.config import ExperimentConfig
from semcons_ray.distributed.metrics import RunMetrics
from semcons_ray.federation.fleet import Reply
from semcons_ray.parts import build, resolve
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.run_folder import Commit, RunFolder, comparable_loss, with_loss, write_file
from semcons_ray.tracking.trackers import Past, Subject, Tracker

_OF_TOKENS = ("nll", "own_nll", "perplexity", "train_loss")
"""Columns in nats a token, which have a mean only over clients of one model."""
_COUNTS = ("num_private", "num_pseudo_labels")
_NO_MEASUREMENT = ("round", "client_id", "started_at")
_NO_SCORES = pd.DataFrame()


class Series:
    """Turns commits, one after another from round 0 on, into numbers by name; those that were not measured are left
    out.

        client_0/nll            of each client, the columns of metrics.parquet
        client_0/lm_eval/...    its scores in tasks of lm-eval, which are columns there, too
        mean/bits_per_byte      their means over clients, where clients' models can be compared
        total/uplink_bytes      sums of the ledger from round 0 on; total/seconds is without idle time
        round/mean_agreement    the columns of rounds.parquet
    """

    def __init__(self) -> None:
        self._models: dict[int, str] = {}
        self._held: dict[int, dict[str, float]] = {}
        self._told = set[int]()  # clients whose models tell how likely they find a text
        self._totals: dict[str, float] = {}

    def add(self, commit: Commit, scores: pd.DataFrame = _NO_SCORES) -> dict[str, float]:
        """The numbers of the next round; see `RunFolder.scores` for `scores`."""
        rows = {row.client_id: _numbers(row) for row in commit.metrics}
        in_tasks = scores.to_dict("index")
        for client in rows.keys() & in_tasks.keys():
            rows[client] |= _measured(in_tasks[client])
        self._models |= {row.client_id: row.model for row in commit.metrics}
        self._held |= rows
        self._told |= {client for client, row in rows.items() if "nll" in row}
        values = {f"client_{client}/{name}": value for client, row in rows.items() for name, value in row.items()}
        values |= self._means() if rows else {}
        self._add_totals(commit)
        values |= self._totals
        return values | {f"round/{name}": value for name, value in _numbers(commit.summary).items()}

    def _means(self) -> dict[str, float]:
        """Means over all clients, without those whose models do not tell a number at all; one that was not measured in
        this round counts with its last measurement."""
        one_model = comparable_loss(self._models[client] for client in self._told) == "nll"
        left_out = _COUNTS if one_model else (*_COUNTS, *_OF_TOKENS)
        means = {}
        for name in dict.fromkeys(name for row in self._held.values() for name in row if name not in left_out):
            rows = [row for client, row in self._held.items() if name in row or client in self._told]
            if all(name in row for row in rows):
                means[f"mean/{name}"] = fmean(row[name] for row in rows)
        return means

    def _add_totals(self, commit: Commit) -> None:
        busy = [row for row in commit.ledger if row.stage != "idle"]
        known = [row.energy_joules for row in commit.ledger if row.energy_source != "unavailable"]
        added = {
            "uplink_bytes": sum(row.uplink_bytes for row in busy),
            "downlink_bytes": sum(row.downlink_bytes for row in busy),
            "tokens": sum(row.tokens for row in busy),
            "seconds": sum(row.duration_seconds for row in busy),
            "cost_usd": sum(row.cost_usd for row in busy),
            **({"energy_joules": sum(known)} if known else {}),
        }
        for name, value in added.items():
            key = f"total/{name}"
            self._totals[key] = self._totals.get(key, 0.0) + value


def _numbers(row: msgspec.Struct) -> dict[str, float]:
    values = msgspec.structs.asdict(row)
    return _measured(values | values.pop("others", {}))


def _measured(values: Mapping[Any, Any]) -> dict[str, float]:
    numbers = {str(name): float(value) for name, value in values.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if name not in _NO_MEASUREMENT and math.isfinite(value)}


class Tracked(Observer):
    """Sends each round to a tracker; after a resume to the tracker's same run, and no round twice.

    Args:
        kind: Name of the tracker.
        folder: The run's folder, which keeps what is known of the tracker's run.
        config: The settings, resolved.
    """

    def __init__(self, kind: str, folder: RunFolder, config: ExperimentConfig) -> None:
        self.name = f"tracking by {kind}"
        self._kind = kind
        self._folder = folder
        self._config = config
        self._known = folder.state / f"{kind}.json"
        self._series = Series()
        self._tracker: Tracker | None = None
        self._past = Past(run_name(config, folder.path))

    def begins(self, commits: Sequence[Commit]) -> None:
        """Open it, and send it the committed rounds that it does not hold."""
        if self._known.is_file():
            self._past = msgspec.json.decode(self._known.read_bytes(), type=Past)
        subject = Subject(self._folder.path, self._config.model_dump(mode="json"))
        self._tracker = build(
            "tracker",
            self._kind,
            self._config.tracking.options.get(self._kind, {}),
            setting=f"tracking.options.{self._kind}",
            offered={"subject": subject, "past": self._past},
        )
        self._remember(getattr(self._tracker, "past", self._past))
        for commit in commits:
            self.round_ends(commit)

    def round_ends(self, commit: Commit) -> None:
        """Send it a round, unless it holds it."""
        summary = commit.summary
        values = self._series.add(commit, self._folder.scores(summary.round))
        if self._tracker and summary.round > self._past.sent:
            self._tracker.log(summary.round, summary.started_at + summary.duration_seconds, values)
            self._remember(msgspec.structs.replace(self._past, sent=summary.round))

    def ends(self, *, finished: bool) -> None:
        """Close it."""
        if self._tracker:
            self._tracker.close(finished=finished)

    def _remember(self, past: Past) -> None:
        self._past = past
        if past.id or not hasattr(self._tracker, "past"):
            write_file(self._known, msgspec.json.encode(past))


def run_name(config: ExperimentConfig, folder: Path) -> str:
    """What a tracker calls a run: its own title if it has one, as runs of a comparison have, else its folder's name."""
    default = ExperimentConfig.model_fields["name"].default
    return folder.resolve().name if config.name == default else config.name


def check_trackers(*configs: ExperimentConfig) -> None:
    """Find out before any work whether the trackers that runs report to can be used.

    Raises:
        ConfigError: One is not installed, or cannot be used; the message says what to do.
    """
    for kind in dict.fromkeys(kind for config in configs for kind in config.tracking.report_to):
        if check := getattr(resolve("tracker", kind), "check", None):
            check()


def trackers(config: ExperimentConfig, folder: RunFolder) -> list[Observer]:
    """Observers that write TensorBoard files, and send to the trackers of `tracking.report_to`."""
    return [Tracked(kind, folder, config) for kind in dict.fromkeys(("tensorboard", *config.tracking.report_to))]


class Exported(Observer):
    """Exports a run's metrics for Prometheus, those of rounds before a resume as well.

    Args:
        run: Name of the run.
        config: The settings.
    """

    name = "Prometheus"

    def __init__(self, run: str, config: ExperimentConfig) -> None:
        self._metrics = RunMetrics(run, config.num_rounds)
        self._loss = comparable_loss(config.scored_models)

    def begins(self, commits: Sequence[Commit]) -> None:
        """Start it, and count the rounds that are done."""
        self._metrics.start()
        for commit in commits:
            self.round_ends(commit)

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        """See `Observer.round_begins`."""
        self._metrics.round_begins(round, num_participants)

    def client_done(self, reply: Reply) -> None:
        """See `Observer.client_done`."""
        self._metrics.client_answered()

    def round_ends(self, commit: Commit) -> None:
        """Count the round."""
        rows = with_loss(commit.metrics)
        self._metrics.round_committed(
            commit.ledger,
            num_lost=commit.summary.num_participants - commit.summary.num_answered,
            bits_per_byte=fmean(row.bits_per_byte for row in rows) if rows else math.nan,
            nll=fmean(row.nll for row in rows) if rows and self._loss == "nll" else math.nan,
            agreement=commit.summary.mean_agreement,
        )

    def ends(self, *, finished: bool) -> None:
        """Stop it."""
        self._metrics.stop()
