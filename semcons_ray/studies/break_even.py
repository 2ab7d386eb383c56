"""Where runs that send answers are faster, or take fewer joules, than runs that send weights: by size of the model, and
by link."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.text import Text

from semcons_ray.config import FederationConfig
from semcons_ray.errors import ConfigError
from semcons_ray.reporting.replay import CALCULATED, Recorded, replay
from semcons_ray.reporting.terminal import as_text, narrow_table
from semcons_ray.reporting.virtual_time import COSTS, describe_federation, write_map
from semcons_ray.runs.run_folder import write_file
from semcons_ray.studies.replays import Place

OWN = "own"
"""Stands for the runs' own models."""
KINDS = ("hours", "joules")
RATES = ("hours_mbit", "joules_mbit")
SLOWEST, FASTEST = 0.01, 1e5
"""Mbit/s between which a break-even is looked for."""
LATENCY_MS = 10.0
"""Latency of the links on which it is looked for."""
RATES_NOTE = "Faster, fewer joules: on lines of such a rate, up and down, with 10 ms of latency, the server's as given."

Runs = Mapping[str, Sequence[Recorded]]
"""The finished runs of each arm."""


@dataclass(frozen=True, eq=False)
class BreakEven:
    """Hours and joules of arms for each hour and joule of another; `semcons_ray.break_even` returns it.

    Attributes:
        table: A row for each model, link and arm, `against` among them: `hours` and `joules`, means over the arm's
            runs; and `hours_ratio` and `joules_ratio`, those over the ones of `against`: below 1 the arm takes less.
        rates: A row for each model and arm but `against`: `hours_mbit` and `joules_mbit`, the rate in Mbit/s, up and
            down, of all clients' lines, below which the arm takes less. 0: it takes more on any line of 0.01 Mbit/s and
            more; infinity: it takes less on any of up to 100 Gbit/s.
        against: The arm with which the others are compared.
        setting: What all of it has in common, in a line.
    """

    table: pd.DataFrame
    rates: pd.DataFrame
    against: str
    setting: str

    @classmethod
    def of(
        cls,
        runs: Runs,
        against: str,
        models: Mapping[str, str | None],
        links: Sequence[str],
        federation: FederationConfig,
    ) -> BreakEven:
        """Replay each arm's runs with every model and link; for the rest see `break_even_of`."""
        federations = {model: _with_model(federation, model, device) for model, device in models.items()}
        totals = {
            (model, link): _totals(runs, _with_link(its_own, link))
            for (model, its_own), link in itertools.product(federations.items(), links)
        }
        table = pd.DataFrame(
            {
                "model": model,
                "device": ", ".join(federations[model].devices),
                "link": link,
                "arm": arm,
                **{kind: of_arm[kind] for kind in KINDS},
                **{f"{kind}_ratio": of_arm[kind] / of_all[against][kind] for kind in KINDS},
            }
            for (model, link), of_all in totals.items()
            for arm, of_arm in of_all.items()
        )
        rates = pd.DataFrame(_rates(runs, against, federations), columns=["model", "device", "arm", *RATES])
        rest = federation.model_copy(update={"devices": {"the device of its model": 1}, "links": {"each link": 1}})
        return cls(table, rates, against, describe_federation(rest))

    def __str__(self) -> str:
        """Ratios, a table for each arm and kind, and the rates; as wide as the terminal."""
        parts: list[Any] = [Text(f"{self.setting}.")]
        for arm, kind in itertools.product(self.arms, KINDS):
            parts += [Text(), Text(f"{self._title(arm, kind)}; below 1 it takes less"), self._ratios(arm, kind)]
        note = f"{RATES_NOTE} All of it is calculated, from the runs' ledgers and the profiles of devices and links."
        return as_text(*parts, Text(), self._rates(), Text(), Text(note)).rstrip("\n")

    @property
    def arms(self) -> list[str]:
        """The arms that are compared with `against`."""
        return [arm for arm in self.table["arm"].unique() if arm != self.against]

    def ratios(self, arm: str, kind: str) -> pd.DataFrame:
        """Ratios of an arm's hours or joules; a row for each model, a column for each link."""
        own = self.table[self.table["arm"] == arm]
        ratios = own.pivot(index="model", columns="link", values=f"{kind}_ratio")
        return ratios.loc[own["model"].unique(), own["link"].unique()]

    def write(self, folder: Path) -> None:
        """Write map.csv and break_even.csv, and for each arm a figure of its ratios: map.svg and map.png, or with
        several arms map-1, map-2, in their order.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in (("map", self.table), ("break_even", self.rates)):
            numbers = table.select_dtypes("number").columns
            marked = table.rename(columns={column: f"{column} [{CALCULATED}]" for column in numbers})
            write_file(folder / f"{name}.csv", marked.to_csv(index=False, float_format="%.6g"))
        for number, arm in enumerate(self.arms, start=1):
            panels = {self._title(arm, kind): self.ratios(arm, kind) for kind in KINDS}
            write_map(panels, folder, "map" if len(self.arms) == 1 else f"map-{number}")

    def _title(self, arm: str, kind: str) -> str:
        return f"{COSTS[kind].capitalize()} of {arm} for each of {self.against}"

    def _ratios(self, arm: str, kind: str) -> Any:
        ratios = self.ratios(arm, kind)
        devices = dict(zip(self.table["model"], self.table["device"], strict=True))
        table = narrow_table()
        for heading in ("model", "device"):
            table.add_column(heading, overflow="fold")
        for link in ratios:
            table.add_column(str(link), justify="right")
        for model, row in ratios.iterrows():
            table.add_row(Text(str(model)), Text(devices[str(model)]), *(f"{ratio:.2g}" for ratio in row))
        return table

    def _rates(self) -> Any:
        table = narrow_table()
        for heading in ("model", "arm"):
            table.add_column(heading, overflow="fold")
        for heading in ("faster", "fewer joules"):
            table.add_column(heading, justify="right")
        for row in self.rates.to_dict("records"):
            table.add_row(Text(row["model"]), Text(row["arm"]), *(rate_in_words(row[kind]) for kind in RATES))
        return table


def rate_in_words(mbit: float) -> str:
    """On which lines an arm takes less, by a break-even rate."""
    return "never" if mbit == 0 else "always" if mbit == math.inf else f"below {mbit:.3g} Mbit/s"


def break_even_of(
    places: Sequence[Place],
    models: Mapping[str, str | None],
    links: Sequence[str],
    federation: FederationConfig,
    arms: Sequence[str],
    against: str | None,
) -> BreakEven:
    """Replay finished runs with models and links in turn; see `semcons_ray.break_even`.

    Args:
        places: The runs.
        models: For each model, or `own`, the device that all clients have; None: those of the federation.
        links: The links that all clients have, in turn.
        federation: The rest of the federation.
        arms: The arms that are compared with `against`; none: all.
        against: An arm's name; None: the only one that averages weights.

    Raises:
        RunFolderError: A run is not finished, or a file of it is missing or damaged.
        ConfigError: See `replay`; or there is no such arm, or none or several that average weights.
    """
    there = dict.fromkeys(place.arm for place in places)
    for option, given in (("--arms", arms), ("--against", [against] if against else [])):
        if unknown := [arm for arm in given if arm not in there]:
            raise ConfigError(f"{option}: there is no arm {unknown[0]}; there are {'; '.join(there)}")
    wanted = {*arms, against} if arms and against else there
    runs: dict[str, list[Recorded]] = {}
    for arm, folder in places:
        if arm in wanted:
            runs.setdefault(arm, []).append(Recorded.read(folder))
    base = against or _averaging(runs)
    runs = {arm: of_arm for arm, of_arm in runs.items() if not arms or arm in (*arms, base)}
    if len(runs) < 2:
        raise ConfigError(f"a break-even needs two arms or more; there is {base} alone")
    return BreakEven.of(runs, base, models, links, federation)


def _averaging(runs: Runs) -> str:
    averaging = [arm for arm, of_arm in runs.items() if of_arm[0].config.algorithm.averages_weights]
    if len(averaging) != 1:
        told = "several arms average weights" if averaging else "no arm averages weights"
        raise ConfigError(f"{told}: name the one to compare with by --against; there are {'; '.join(runs)}")
    return averaging[0]


def _with_model(federation: FederationConfig, model: str, device: str | None) -> FederationConfig:
    devices = {device: 1.0} if device else federation.devices
    return federation.model_copy(update={"model": None if model == OWN else model, "devices": devices})


def _with_link(federation: FederationConfig, link: str) -> FederationConfig:
    return federation.model_copy(update={"links": {link: 1.0}})


def _totals(runs: Runs, federation: FederationConfig) -> dict[str, dict[str, float]]:
    """Means over each arm's runs of hours and joules."""
    totals = {arm: [replay(run, federation).totals for run in of_arm] for arm, of_arm in runs.items()}
    return {arm: {kind: float(np.mean([one[kind] for one in totals[arm]])) for kind in KINDS} for arm in runs}


def _rates(runs: Runs, base: str, federations: Mapping[str, FederationConfig]) -> Iterator[dict[str, Any]]:
    for (model, federation), arm in itertools.product(federations.items(), runs):
        if arm != base:
            found = [_rate(runs[arm], runs[base], federation, kind) for kind in KINDS]
            row = {"model": model, "device": ", ".join(federation.devices), "arm": arm}
            yield row | dict(zip(RATES, found, strict=True))


def _rate(runs: Sequence[Recorded], base: Sequence[Recorded], federation: FederationConfig, kind: str) -> float:
    """The rate at which both arms take as much, by bisection of its logarithm, to 1%."""
    line = "line of any rate"

    def excess(power: float) -> float:
        own = {line: {"up_mbit": 10**power, "down_mbit": 10**power, "latency_ms": LATENCY_MS}}
        imagined = federation.model_copy(update={"own_links": {**federation.own_links, **own}})
        totals = _totals({"arm": runs, "base": base}, _with_link(imagined, line))
        return totals["arm"][kind] - totals["base"][kind]

    low, high = math.log10(SLOWEST), math.log10(FASTEST)
    if excess(low) > 0 or excess(high) < 0:
        return 0.0 if excess(low) > 0 else math.inf
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return 10**low
