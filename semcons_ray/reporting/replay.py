"""A finished run's rounds in a federation that it need not have been in: with other devices and links, another policy,
a model of another size. Nothing is run again: what each visit trained, wrote and sent is in the run's ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from semcons_ray.config import ExperimentConfig, FederationConfig
from semcons_ray.data.split import read_split
from semcons_ray.errors import ConfigError, RunFolderError
from semcons_ray.messages import text_of
from semcons_ray.modeling.shapes import SHAPES, Shape
from semcons_ray.reporting.tables import mean_by_round, read_json, read_ledger, read_metrics, read_rounds, telling
from semcons_ray.runs.run_folder import Loss, RunFolder, comparable_loss
from semcons_ray.runs.virtual_clock import make_clock, tokens_of_example
from semcons_ray.timeline.clock import Closed
from semcons_ray.timeline.costs import JOULES, JOULES_PER_KWH, with_joules
from semcons_ray.timeline.devices import Device, Model
from semcons_ray.timeline.profiles import region
from semcons_ray.timeline.work import ServerWork, Visits, server_work, tokens_of

MEASURED, SCALED, CALCULATED = "measured", "scaled", "calculated"
"""Where a column is from: the run's own ledger; the same, made larger for another model; or the clock and profiles."""


@dataclass(frozen=True)
class Recorded:
    """What a finished run did.

    Attributes:
        config: Its settings.
        models: Sizes of its clients' models by name.
        ledger: Its ledger; see `LedgerRow`.
        prompt_tokens: Tokens of all public prompts together.
        example_tokens: Tokens of an example, on average.
        adapter: Number of weights of an adapter for each unit of rank; 0 if there is none.
        losses: By round, the mean over clients of the loss by which they can be compared; round 0 is the base model.
        num_rounds: Number of rounds that are done.
    """

    config: ExperimentConfig
    models: Mapping[str, Model]
    ledger: pd.DataFrame
    prompt_tokens: int
    example_tokens: float
    adapter: float
    losses: pd.Series[float]
    num_rounds: int

    @classmethod
    def read(cls, path: Path, loss: Loss | None = None) -> Recorded:
        """Read a finished run's folder.

        Args:
            path: The folder.
            loss: The loss to read; None: the one by which the run's clients can be compared.

        Raises:
            RunFolderError: It is none, the run is not finished, or it does not say how large its models are.
        """
        folder = RunFolder(path)
        if not folder.is_finished(folder.stored_config().num_rounds):
            raise RunFolderError(f"{path} is not finished; semcons resume {path} goes on with it")
        return cls.so_far(path, loss)

    @classmethod
    def so_far(cls, path: Path, loss: Loss | None = None) -> Recorded:
        """Read the rounds that are done of a run that may still be going on; see `read`."""
        folder = RunFolder(path)
        config = folder.stored_config()
        split = read_split(folder.data)
        metrics = read_metrics(path)
        loss = loss or comparable_loss(telling(metrics, "nll")["model"])
        sizes = read_json(path / "placement.json").get("models", {})
        return cls(
            config=config,
            models={name: size for name in config.open_models if (size := _size(name, sizes))},
            ledger=read_ledger(path),
            prompt_tokens=tokens_of(text_of(example.prompt) for example in split.public),
            example_tokens=tokens_of_example(split),
            adapter=_weights_per_rank(folder.adapters),
            losses=mean_by_round(metrics, loss).rename(loss),
            num_rounds=int(read_rounds(path)["round"].max()),
        )


@dataclass(frozen=True)
class Replay:
    """A run in a federation.

    Attributes:
        rounds: A row for each round: when it began and ended, who was asked and heard, who came last and what it did
            for how long, joules, grams of CO2 and bytes, and the loss after it where that was measured.
        visits: A row for each visit; see `clock.COLUMNS` and `costs.JOULES`, with names of devices and links.
        sources: For each column, whether it is measured, scaled or calculated.
        base_loss: The loss before round 1; NaN if it was not measured.
    """

    rounds: pd.DataFrame
    visits: pd.DataFrame
    sources: Mapping[str, str]
    base_loss: float = math.nan

    @property
    def loss_by_hours(self) -> pd.Series[float]:
        """The loss by virtual hours, from the base model on."""
        later = self.rounds.set_index("hours")["loss"]
        curve: pd.Series[float] = pd.concat([pd.Series({0.0: self.base_loss}), later]).dropna().rename_axis("hours")
        return curve

    @property
    def totals(self) -> pd.Series[float]:
        """Of the whole run: virtual hours, joules by what they were for, grams of CO2 and bytes, and the last loss."""
        sums = self.rounds[[*JOULES, "server_joules", "joules", "grams_co2", "bytes"]].sum()
        last = self.rounds["loss"].dropna().tail(1).to_list() or [math.nan]
        return pd.concat([pd.Series({"hours": self.rounds["hours"].iloc[-1]}), sums, pd.Series({"loss": last[0]})])

    def hours_to(self, loss: float) -> float:
        """Virtual hours until the loss is as low as this; NaN if it never is."""
        reached = self.rounds.loc[self.rounds["loss"] <= loss, "hours"]
        return float(reached.iloc[0]) if len(reached) else math.nan

    def marked(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table of this replay with the source of each column in its name."""
        return table.rename(columns=lambda name: f"{name} [{self.sources.get(name, CALCULATED)}]")


def replay(run: Recorded, federation: FederationConfig, model: str | None = None) -> Replay:
    """Let a finished run's rounds pass in a federation.

    Where its policy ends rounds before all have answered, a client that is still at work is not asked, and its visit of
    the round is left out. What would have been learnt then is not known: the loss is that of the run.

    Args:
        run: The run.
        federation: The federation.
        model: Name of a model for whose size times and weights are calculated; None: the run's own.

    Raises:
        ConfigError: The federation has no devices, or is refused; see `make_clock`. Or weights would have to be made
            larger, and the run has no adapter by which that could be.
    """
    if model:
        federation = federation.model_copy(update={"model": model})
    if not federation.devices:
        raise ConfigError("federation.devices is empty: name devices, as {laptop-cpu: 3, rtx-4090: 1}")
    unknown = [name for name in run.config.open_models if name not in run.models]
    if unknown and not federation.model:
        raise ConfigError(f"neither the run's placement.json nor its name says how large {unknown[0]} is; use --model")
    if federation.hears_late and not run.config.algorithm.is_so("can_hear_late"):
        name = run.config.algorithm.name
        raise ConfigError(f"federation.policy {federation.policy}: clients of algorithm.name {name} are not heard late")
    config = run.config.model_copy(update={"federation": federation})
    clock = make_clock(config, run.models, run.example_tokens)
    weights = _growth(run, federation.model) if config.algorithm.averages_weights and federation.model else 1.0
    recorded = Visits(run.ledger, run.prompt_tokens, weights)
    ledgers = dict([*run.ledger[run.ledger["client_id"] < 0].groupby("round")])
    closed: list[Closed] = []
    ended: list[float] = []
    for round in range(1, run.num_rounds + 1):
        visits = recorded[round]
        idle = {*clock.idle([visit.client_id for visit in visits])}
        asked = [visit for visit in visits if visit.client_id in idle]
        closed.append(clock.round(round, asked))
        work = server_work(ledgers[round]) if round in ledgers else ServerWork(0, 0)
        clock.serve(work._replace(received_bytes=sum(visit.uplink_bytes for visit in asked)))
        ended.append(clock.seconds)
    clock.finish()
    sources = dict.fromkeys(("round", "client_id", "num_asked", "loss"), MEASURED)
    sources |= dict.fromkeys(("downlink_bytes", "uplink_bytes", "bytes"), MEASURED if weights == 1 else SCALED)
    members, grams = clock.members, region(federation.region)
    table = with_joules(clock.visits(), pd.Series({one.round: one.closed_at for one in closed}), members)
    table["device"] = [members.devices.name(client) for client in table["client_id"]]
    table["link"] = [members.links.name(client) for client in table["client_id"]]
    rounds = _rounds(closed, ended, table, run.losses, clock.site.device, grams)
    return Replay(rounds, table, sources, float(run.losses.get(0, math.nan)))


def _rounds(
    closed: Sequence[Closed],
    ended: Sequence[float],
    visits: pd.DataFrame,
    losses: pd.Series[float],
    server: Device,
    grams: float,
) -> pd.DataFrame:
    """See `Replay.rounds`."""
    sums = visits.groupby("round")[[*JOULES, "uplink_bytes", "downlink_bytes"]].sum()
    rows = []
    for one, end in zip(closed, ended, strict=True):
        heard = visits[visits["counted_in"] == one.round]
        last = heard.iloc[-1] if len(heard) else None
        served = end - one.closed_at
        row: dict[str, object] = {
            "round": one.round,
            "hours": end / 3600,
            "seconds": end - one.started_at,
            "num_asked": int((visits["round"] == one.round).sum()),
            "num_heard": len(one.arrived),
            "last_client": int(last["client_id"]) if last is not None else -1,
            "last_device": last["device"] if last is not None else "",
            "waited_for_last_seconds": last["ended_at"] - heard["ended_at"].median() if last is not None else math.nan,
            "last_fine_tune_seconds": last["fine_tune_seconds"] if last is not None else math.nan,
            "last_generate_seconds": last["generate_seconds"] if last is not None else math.nan,
            "last_transfer_seconds": last[["downlink_seconds", "latency_seconds", "uplink_seconds"]].sum()
            if last is not None
            else math.nan,
            "server_seconds": served,
            "server_joules": server.joules(served, one.closed_at - one.started_at),
        }
        rows.append(row)
    table = pd.DataFrame(rows).set_index("round").join(sums).fillna(dict.fromkeys(sums.columns, 0.0)).reset_index()
    table["joules"] = table[[*JOULES, "server_joules"]].sum(axis="columns")
    table["grams_co2"] = table["joules"] / JOULES_PER_KWH * grams
    table["bytes"] = table.pop("uplink_bytes") + table.pop("downlink_bytes")
    return table.assign(loss=table["round"].map(losses))


def _shape(name: str) -> Shape | None:
    """The shape of a model by its name in a run's settings, where it is a known one."""
    known = name.rsplit("/")[-1].rsplit(":")[-1].lower().split("@")[0]
    return SHAPES.get(known) or SHAPES.get(known.removesuffix("-instruct").removesuffix("-it"))


def _size(name: str, stored: Mapping[str, Any]) -> Model | None:
    """The size of a model of a run, as its placement.json has it, or by its name where an older run's does not."""
    shape = _shape(name)
    return Model(**stored[name]) if name in stored else Model.of(shape) if shape else None


def _weights_per_rank(adapters: Path) -> float:
    """Number of weights of the first adapter that there is, for each unit of its rank."""
    for path in sorted(adapters.glob("client_*/adapter_model.safetensors")):
        rank = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        with safe_open(path, framework="np") as file:
            sizes = [math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
            return float(sum(sizes) / rank)
    return 0.0


def _growth(run: Recorded, model: str) -> float:
    """By how much an adapter for a model is larger than the run's own, at the same rank and for the same maps."""
    targets = run.config.model.lora.target_modules

    def weights_per_rank(shape: Shape) -> float:
        maps = shape.linear_maps
        return sum(maps.values() if targets == "all-linear" else [maps[name] for name in targets if name in maps])

    own = _shape(run.config.open_models[0])
    here = run.adapter or (weights_per_rank(own) if own else 0.0)
    if not here:
        raise ConfigError("the run has no adapters, by which messages with weights could be scaled to another model")
    return weights_per_rank(SHAPES[model]) / here
