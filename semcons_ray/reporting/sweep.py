"""The report of a sweep: Pareto fronts of quality against bytes, seconds and joules, and the effect of each swept
key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from rich import box
from rich.table import Table
from rich.text import Text

from semcons_ray.evaluation.metrics import find_metric
from semcons_ray.metering.units import format_quantity, scale
from semcons_ray.reporting.drawing import BLUE, FAINT, INK, ORANGE, Figure, log_axis, render
from semcons_ray.reporting.html import page_environment
from semcons_ray.reporting.pareto import pareto_front
from semcons_ray.reporting.tables import (
    describe_trial,
    format_number,
    format_seconds,
    format_setting,
    format_usd,
    short_keys,
)
from semcons_ray.reporting.terminal import as_text
from semcons_ray.runs.run_folder import Loss, write_file

COSTS = {"total_bytes": ("bytes on the wire", "B"), "seconds": ("time at work", "s"), "joules": ("energy", "J")}
LOSSES = {
    "bits_per_byte": "mean bits per byte",
    "worst_bits_per_byte": "bits per byte of the worst client",
    "mean_nll": "mean test NLL",
    "worst_nll": "test NLL of the worst client",
}
MANY = 8
"""If a key has more numbers as values than this, they are grouped into quarters."""
DECADE = 20.0
"""A cost that varies by more than this factor is drawn on a logarithmic axis."""


def metric_name(column: str) -> str:
    """What a column of `comparison.costs_by_round` is called."""
    return LOSSES.get(column) or f"mean {find_metric(column).label}"


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The results of a sweep.

    Attributes:
        name: Its title.
        keys: The keys that were swept.
        metric: The metric by which trials are ranked.
        higher_is_better: Whether a higher value of the metric is better.
        loss: The loss that compares all trials, see `comparable_loss`.
        trials: A row for each trial, the best first. Columns: trial, one for each swept key, status (finished, stopped
            by the scheduler, unfinished), rounds, and those of `comparison.costs_by_round` after the last of these
            rounds.
    """

    name: str
    keys: tuple[str, ...]
    metric: str
    higher_is_better: bool
    loss: Loss
    trials: pd.DataFrame

    @property
    def shown(self) -> dict[str, str]:
        """Names of the scores in tables by column: the metric, NLL if all trials have one model, and ROUGE-L."""
        columns = (self.metric, *(["mean_nll"] if self.loss == "nll" else []), "rouge_l")
        return {column: metric_name(column) for column in columns}

    @property
    def is_paid(self) -> bool:
        """Whether something was paid for a trial."""
        return bool(self.trials["cost_usd"].any())

    @property
    def finished(self) -> pd.DataFrame:
        """The trials that ran to their end; only these are in fronts and effects."""
        return self.trials[self.trials["status"] == "finished"].set_index("trial")

    def fronts(self) -> dict[str, list[str]]:
        """By cost, the trials on its Pareto front, from the cheapest to the best."""
        finished = self.finished
        losses = -finished[self.metric] if self.higher_is_better else finished[self.metric]
        return {cost: pareto_front(finished[cost], losses) for cost in COSTS}

    @property
    def differing(self) -> tuple[str, ...]:
        """The keys in which trials differ, which tell them apart; all keys if there are none."""
        return tuple(key for key in self.keys if self.trials[key].nunique(dropna=False) > 1) or self.keys

    def describe(self, trial: Mapping[str, Any]) -> str:
        """The trial of a row, by what tells it apart."""
        return describe_trial({key: trial[key] for key in self.differing})

    def effects(self) -> pd.DataFrame:
        """The metric at each value of each key, over all finished trials with that value, whatever their other keys.

        Returns:
            Columns key, value (as text, in ascending order), number (the value as a number, the median of several; NaN
            if it is none), trials (how many), mean, std (NaN for one), lowest, highest.
        """
        rows = []
        for key in self.keys:
            for text, number, trials in _groups(self.finished[key]):
                found = self.finished.loc[trials, self.metric]
                rows.append((key, text, number, len(found), found.mean(), found.std(), found.min(), found.max()))
        return pd.DataFrame(rows, columns=["key", "value", "number", "trials", "mean", "std", "lowest", "highest"])

    def spans(self) -> dict[str, float]:
        """By key, the difference between the highest and the lowest mean of the metric at a value."""
        by_key = self.effects().groupby("key", sort=False)["mean"]
        return {str(key): float(span) for key, span in (by_key.max() - by_key.min()).items()}


def _groups(values: pd.Series[Any]) -> list[tuple[str, float, pd.Index[Any]]]:
    """Trials by value in ascending order, what is no number last; numbers that are more than `MANY` as quarters.

    Returns:
        For each group the text of the value, the number (the median of a quarter; NaN for what is none) and the trials.
    """
    numbers = _numbers(values)
    if numbers is None:
        texts = values.map(format_setting)
        as_numbers = pd.to_numeric(texts, errors="coerce")
        order = sorted(set(zip(as_numbers.isna(), as_numbers.fillna(0.0), texts, strict=True)))
        return [(text, math.nan, values.index[texts == text]) for _, _, text in order]
    if numbers.nunique() <= MANY:
        tried = [(number, values.index[numbers == number]) for number in sorted(set(numbers))]
        return [(format_setting(values[trials[0]]), number, trials) for number, trials in tried]
    quarters = pd.qcut(numbers, 4, duplicates="drop")
    groups = [(quarter, quarters == quarter) for quarter in quarters.cat.categories]
    return [
        (f"{quarter.left:.3g} to {quarter.right:.3g}", float(numbers[within].median()), values.index[within])
        for quarter, within in groups
        if within.any()
    ]


def _numbers(values: pd.Series[Any]) -> pd.Series[float] | None:
    """The values, if they can be on an axis of numbers."""
    kinds = pd.api.types
    if kinds.is_bool_dtype(values) or not kinds.is_numeric_dtype(values) or values.isna().any():
        return None
    return values.astype(float)


def _spreads(values: pd.Series[float]) -> bool:
    """Whether positive values differ so much that they are drawn on a logarithmic axis."""
    return len(values) > 0 and values.min() > 0 and values.max() > DECADE * values.min()


def trial_cells(result: SweepResult) -> pd.DataFrame:
    """The trials as texts under short headings, the best first, with the fronts that each is on."""
    fronts, keys = result.fronts(), short_keys(result.differing)
    costs = ("bytes", "time", "energy", *(["paid"] if result.is_paid else []))
    rows = []
    for _, row in result.trials.iterrows():
        on = [name for name, members in zip(costs[:3], fronts.values(), strict=True)
              if row["trial"] in members]  # fmt: skip
        remark = ", ".join(on) if row["status"] == "finished" else f"{row['status']} after round {row['rounds']}"
        rows.append(
            (
                *(format_setting(row[key]) for key in keys),
                *(format_number(row[column]) for column in result.shown),
                format_quantity(row["total_bytes"], "B"),
                format_seconds(row["seconds"]),
                format_quantity(row["joules"], "J"),
                *([format_usd(row["cost_usd"])] if result.is_paid else []),
                remark + _failed(row["failed"]),
            )
        )
    headings = (*keys.values(), *result.shown.values(), *costs, "on the front of")
    return pd.DataFrame(rows, columns=list(headings))


def render_sweep(result: SweepResult, width: int | None = None) -> str:
    """A table of the trials with the fronts they are on, and the effect of each key, as plain text."""
    table = Table(title=Text(result.name), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    cells = trial_cells(result)
    keys = short_keys(result.differing)
    for heading in cells:
        is_text = heading in (*keys.values(), "on the front of")
        table.add_column(str(heading), justify="left" if is_text else "right", overflow="fold")
    for row in cells.to_numpy().tolist():
        table.add_row(*map(Text, row))
    spans = sorted(result.spans().items(), key=lambda item: -item[1])
    effects = ", ".join(f"{key} {format_number(span)}" for key, span in spans if not math.isnan(span))
    return f"{as_text(table, width=width)}\nbest less worst {metric_name(result.metric)} by key: {effects or '–'}"


def _failed(visits: int) -> str:
    """A remark on visits of clients that failed, if any did."""
    return f" ({visits} visit{'s' if visits > 1 else ''} failed)" if visits else ""


def write_sweep_report(result: SweepResult, config_yaml: str, path: Path) -> None:
    """Write the report: one HTML page that needs no network, no script and no other file.

    Args:
        result: The results of the sweep.
        config_yaml: The sweep's settings, shown in the page.
        path: File to write.
    """
    templates = resources.files("semcons_ray.reporting") / "templates"
    fronts, finished = result.fronts(), result.finished
    figures = [front_figure(result, cost) for cost in fronts] if len(finished) else []
    effects = result.effects()
    figures += [_effect_figure(result, key, effects[effects["key"] == key]) for key in result.keys if len(finished)]
    energy = " or ".join(dict.fromkeys(result.trials["energy_source"]))
    page = (
        page_environment()
        .get_template("sweep.html.j2")
        .render(
            result=result,
            metric=metric_name(result.metric),
            style=Markup((templates / "report.css").read_text(encoding="utf-8")),
            statuses=result.trials["status"].value_counts().to_dict(),
            figures=[{"svg": Markup(figure.svg), "figure": figure} for figure in figures],
            fronts=[
                {"cost": COSTS[cost][0], "column": cost, "rows": finished.loc[members].reset_index().to_dict("records")}
                for cost, members in fronts.items()
            ],
            effects=effects.to_dict("records"),
            trials=result.trials.to_dict("records"),
            on_front={trial for members in fronts.values() for trial in members},
            energy=energy,
            keys=short_keys(result.differing),
            text=format_setting,
            failed=_failed,
            config_yaml=config_yaml,
        )
    )
    write_file(path, page)


def front_figure(result: SweepResult, cost: str = "total_bytes") -> Figure:
    """The finished trials by their metric and a cost, one of `COSTS`, and the Pareto front of the two."""
    what, unit = COSTS[cost]
    finished, members = result.finished, result.fronts()[cost]
    shown = finished[np.isfinite(finished[cost]) & np.isfinite(finished[result.metric])]

    def draw(axes: Axes, canvas: Canvas) -> None:
        logarithmic = _spreads(shown[cost])
        divisor, prefixed = (1.0, unit) if logarithmic else scale(shown[cost].max() if len(shown) else 0.0, unit)
        axes.plot(shown[cost] / divisor, shown[result.metric], "o", color=BLUE, alpha=0.45, label="trial")
        front = shown.loc[members]
        axes.step(front[cost] / divisor, front[result.metric], where="post", color=FAINT, zorder=0)
        axes.plot(front[cost] / divisor, front[result.metric], "D", color=ORANGE, markersize=7, label="Pareto front")
        for number, (_, row) in enumerate(front.iterrows(), 1):
            place = (row[cost] / divisor, row[result.metric])
            axes.annotate(str(number), place, (5, 4), textcoords="offset points", fontsize=9, color=INK)
        if logarithmic:
            log_axis(axes, "x", unit)
        axes.margins(x=0.08, y=0.1)
        axes.set_xlabel(what if logarithmic else f"{what} ({prefixed})")
        axes.set_ylabel(metric_name(result.metric))
        axes.legend(loc="best")

    better = "higher" if result.higher_is_better else "lower"
    title = f"{len(members)} of {len(finished)} trials are on the front of {metric_name(result.metric)} against {what}"
    known = " or ".join(dict.fromkeys(shown["energy_source"])) if cost == "joules" else "measured"
    caption = (
        f"A point a finished trial; {better} and further left is better. Numbers: the list below. {what.capitalize()} "
        f"of all clients and the server without evaluation, {known or 'unavailable'}."
    )
    return Figure(f"front-{cost.replace('_', '-')}", title, caption, render(f"front-{cost}", title, draw))


def _effect_figure(result: SweepResult, key: str, effects: pd.DataFrame) -> Figure:
    def draw(axes: Axes, canvas: Canvas) -> None:
        values, found = result.finished[key], result.finished[result.metric]
        numbers = _numbers(values)
        places, means = effects["number"], "D-"
        if numbers is None:
            means = "D"
            places = pd.Series(range(len(effects)), index=effects.index)
            numbers = values.map(format_setting).map(dict(zip(effects["value"], places, strict=True)))
        elif _spreads(numbers):
            log_axis(axes, "x")
        axes.plot(numbers, found, "o", color=BLUE, alpha=0.35, markersize=4)
        axes.errorbar(places, effects["mean"], yerr=effects["std"].fillna(0.0), fmt=means, color=ORANGE, capsize=4)
        if values.nunique() <= MANY:
            axes.set_xticks(places, [_wrapped(value) for value in effects["value"]])
        axes.margins(x=0.12)
        axes.set_xlabel(key)
        axes.set_ylabel(metric_name(result.metric))
        axes.grid(False, axis="x")

    span = effects["mean"].max() - effects["mean"].min()
    title = f"{key} moves the {metric_name(result.metric)} by {format_number(span)} on average"
    caption = (
        "Dots: finished trials. Diamonds: their mean at each value, or over each quarter of many values, with other "
        "keys averaged out; bars: ± one standard deviation."
    )
    name = f"effect-{key.replace('.', '-').replace('_', '-')}"
    return Figure(name, title, caption, render(name, title, draw))


def _wrapped(value: str) -> str:
    """A long label, broken into lines after commas."""
    return value if len(value) < 18 else value.replace(", ", ",\n")
