"""The report of a sweep: Pareto fronts of quality against bytes, seconds and joules, and the effect of each swept
key."""

from __future__ import annotations

import io
import json
import math
import shutil
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
from rich.console import Console
from rich.table import Table
from rich.text import Text

from semcons_ray.metering.units import format_quantity, scale
from semcons_ray.reporting.drawing import BLUE, FAINT, INK, ORANGE, Figure, log_axis, render
from semcons_ray.reporting.html import page_environment
from semcons_ray.reporting.pareto import pareto_front
from semcons_ray.reporting.tables import format_number, format_seconds, short_model_name
from semcons_ray.runs.run_folder import Loss, write_file

COSTS = {"total_bytes": ("bytes on the wire", "B"), "seconds": ("time at work", "s"), "joules": ("energy", "J")}
METRICS = {
    "bits_per_byte": "mean bits per byte",
    "worst_bits_per_byte": "bits per byte of the worst client",
    "mean_nll": "mean test NLL",
    "worst_nll": "test NLL of the worst client",
    "rouge_l": "mean ROUGE-L",
    "similarity": "mean similarity",
}
MANY = 8
"""If a key has more numbers as values than this, they are grouped into quarters."""
DECADE = 20.0
"""A cost that varies by more than this factor is drawn on a logarithmic axis."""


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
        return {column: METRICS[column] for column in columns}

    @property
    def finished(self) -> pd.DataFrame:
        """The trials that ran to their end; only these are in fronts and effects."""
        return self.trials[self.trials["status"] == "finished"].set_index("trial")

    def fronts(self) -> dict[str, list[str]]:
        """By cost, the trials on its Pareto front, from the cheapest to the best."""
        finished = self.finished
        losses = -finished[self.metric] if self.higher_is_better else finished[self.metric]
        return {cost: pareto_front(finished[cost], losses) for cost in COSTS}

    def effects(self) -> pd.DataFrame:
        """The metric at each value of each key, over all finished trials with that value, whatever their other keys.

        Returns:
            Columns key, value (as text), trials (how many), mean, std (NaN for one), lowest, highest.
        """
        rows = []
        for key in self.keys:
            groups = self.finished.groupby(_grouped(self.finished[key]), sort=False, observed=True)[self.metric]
            table = groups.agg(["count", "mean", "std", "min", "max"])
            for value, row in table.iterrows():
                rows.append((key, str(value), int(row["count"]), row["mean"], row["std"], row["min"], row["max"]))
        return pd.DataFrame(rows, columns=["key", "value", "trials", "mean", "std", "lowest", "highest"])

    def spans(self) -> dict[str, float]:
        """By key, the difference between the highest and the lowest mean of the metric at a value."""
        by_key = self.effects().groupby("key", sort=False)["mean"]
        return {str(key): float(span) for key, span in (by_key.max() - by_key.min()).items()}


def _grouped(values: pd.Series[Any]) -> pd.Series[str]:
    """Values as text, in ascending order; numbers that are more than `MANY` as quarters."""
    ordered = values.sort_values(kind="stable")
    if pd.api.types.is_numeric_dtype(ordered) and ordered.nunique() > MANY:
        bins = pd.qcut(ordered, 4, duplicates="drop")
        return bins.map(lambda bin: f"{bin.left:.3g} to {bin.right:.3g}").astype(str)
    return ordered.map(_text)


def _text(value: object) -> str:
    """A value as readable text; a mix of models as shares and names."""
    if isinstance(value, str) and value.startswith("{"):
        shares = json.loads(value).items()
        return ", ".join(f"{share:g} {short_model_name(name)}" for name, share in shares) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render_sweep(result: SweepResult, width: int | None = None) -> str:
    """A table of the trials with the fronts they are on, and the effect of each key, as plain text."""
    fronts = result.fronts()
    table = Table(title=Text(result.name), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in (*result.keys, *result.shown.values(), "bytes", "time", "energy", "on the front of"):
        table.add_column(heading, justify="left" if heading in result.keys else "right", overflow="fold")
    for _, row in result.trials.iterrows():
        on = [name for name, members in zip(("bytes", "time", "energy"), fronts.values(), strict=True)
              if row["trial"] in members]  # fmt: skip
        remark = ", ".join(on) if row["status"] == "finished" else f"{row['status']} after round {row['rounds']}"
        table.add_row(
            *(Text(_text(row[key])) for key in result.keys),
            *(format_number(row[column]) for column in result.shown),
            format_quantity(row["total_bytes"], "B"),
            format_seconds(row["seconds"]),
            format_quantity(row["joules"], "J"),
            remark + _failed(row["failed"]),
        )
    stream = io.StringIO()
    Console(file=stream, width=width or max(100, shutil.get_terminal_size((120, 24)).columns), color_system=None).print(
        table
    )
    spans = sorted(result.spans().items(), key=lambda item: -item[1])
    effects = ", ".join(f"{key} {format_number(span)}" for key, span in spans if not math.isnan(span))
    return f"{stream.getvalue()}\nbest less worst {METRICS[result.metric]} by key: {effects or '–'}"


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
    figures = (
        [_front_figure(result, finished, cost, members) for cost, members in fronts.items()] if len(finished) else []
    )
    effects = result.effects()
    figures += [_effect_figure(result, key, effects[effects["key"] == key]) for key in result.keys if len(finished)]
    energy = " or ".join(dict.fromkeys(result.trials["energy_source"]))
    page = (
        page_environment()
        .get_template("sweep.html.j2")
        .render(
            result=result,
            metric=METRICS[result.metric],
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
            text=_text,
            failed=_failed,
            config_yaml=config_yaml,
        )
    )
    write_file(path, page)


def _front_figure(result: SweepResult, finished: pd.DataFrame, cost: str, members: list[str]) -> Figure:
    what, unit = COSTS[cost]
    shown = finished[np.isfinite(finished[cost]) & np.isfinite(finished[result.metric])]

    def draw(axes: Axes, canvas: Canvas) -> None:
        logarithmic = len(shown) > 0 and shown[cost].min() > 0 and shown[cost].max() > DECADE * shown[cost].min()
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
        axes.set_ylabel(METRICS[result.metric])
        axes.legend(loc="best")

    better = "higher" if result.higher_is_better else "lower"
    title = f"{len(members)} of {len(finished)} trials are on the front of {METRICS[result.metric]} against {what}"
    known = " or ".join(dict.fromkeys(shown["energy_source"])) if cost == "joules" else "measured"
    caption = (
        f"A point a finished trial; {better} and further left is better. Numbers: the list below. {what.capitalize()} "
        f"of all clients and the server without evaluation, {known or 'unavailable'}."
    )
    return Figure(f"front-{cost.replace('_', '-')}", title, caption, render(f"front-{cost}", title, draw))


def _effect_figure(result: SweepResult, key: str, effects: pd.DataFrame) -> Figure:
    def draw(axes: Axes, canvas: Canvas) -> None:
        places = np.arange(len(effects))
        points = result.finished[[key, result.metric]]
        position = {value: place for place, value in enumerate(effects["value"])}
        each = _grouped(points[key]).map(position)
        axes.plot(each, points.loc[each.index, result.metric], "o", color=BLUE, alpha=0.35, markersize=4)
        axes.errorbar(places, effects["mean"], yerr=effects["std"].fillna(0.0), fmt="D-", color=ORANGE, capsize=4)
        axes.set_xticks(places, [_wrapped(value) for value in effects["value"]])
        axes.margins(x=0.12)
        axes.set_xlabel(key)
        axes.set_ylabel(METRICS[result.metric])
        axes.grid(False, axis="x")

    span = effects["mean"].max() - effects["mean"].min()
    title = f"{key} moves the {METRICS[result.metric]} by {format_number(span)} on average"
    caption = (
        "Dots: finished trials. Diamonds: their mean at each value, with other keys averaged out; bars: ± one standard "
        "deviation."
    )
    name = f"effect-{key.replace('.', '-').replace('_', '-')}"
    return Figure(name, title, caption, render(name, title, draw))


def _wrapped(value: str) -> str:
    """A long label, broken into lines after commas."""
    return value if len(value) < 18 else value.replace(", ", ",\n")
