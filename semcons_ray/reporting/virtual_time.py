"""Virtual time in figures and tables: who did what when in a federation, who waited for whom, and what it cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.text import Text

from semcons_ray.config import FederationConfig
from semcons_ray.errors import ConfigError, RunFolderError
from semcons_ray.metering.ledger import merged
from semcons_ray.metering.units import format_quantity, scale
from semcons_ray.parts import STORED
from semcons_ray.reporting.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    SKY,
    STAGE_COLOURS,
    Figure,
    place_legend,
    render,
    save,
    stacked_bars,
)
from semcons_ray.reporting.pareto import arm_styles, draw_arms, linear_axis, quantity_axis
from semcons_ray.reporting.replay import CALCULATED, Recorded, Replay, replay
from semcons_ray.reporting.tables import Run, format_number, format_seconds
from semcons_ray.reporting.terminal import as_text, narrow_table
from semcons_ray.reporting.timeline import time_unit
from semcons_ray.runs.run_folder import LOSS_NAMES, Loss

MAX_CLIENTS = 40
MAX_ROUND_MARKS = 20

PHASES = {
    "download": SKY,
    "fine-tuning": STAGE_COLOURS["fine_tune"],
    "answering": STAGE_COLOURS["generate"],
    "upload": STAGE_COLOURS["encode"],
    "waiting": GREY,
    "server": STAGE_COLOURS["aggregate"],
}
"""What clients and the server do in virtual time, and its colours."""

JOULES = {
    "fine-tuning": PHASES["fine-tuning"],
    "answering": PHASES["answering"],
    "radio": PHASES["upload"],
    "waiting": PHASES["waiting"],
    "server": PHASES["server"],
}
"""What joules are for, and its colours."""

COSTS = {
    "hours": "virtual hours",
    "compute_joules": "computing",
    "radio_joules": "radio",
    "idle_joules": "waiting",
    "server_joules": "server",
    "joules": "all joules",
    "grams_co2": "g CO2",
    "bytes": "bytes",
}
"""Headings of what runs cost, by column of `Replay.totals`."""


SOURCES_NOTE = (
    "Measured: the run's own; scaled: the same, made larger for the model; calculated: by the clock, from the run's "
    "ledger and the profiles of devices and links."
)


@dataclass(frozen=True)
class VirtualTime:
    """A report's section on the run's virtual time.

    Attributes:
        setting: The federation, in a line.
        figures: Its figures.
        rounds: For each round, what the table of who waited for whom has.
        note: Why there is nothing else, if it cannot be shown.
    """

    setting: str
    figures: tuple[Figure, ...] = ()
    rounds: tuple[Mapping[str, str], ...] = ()
    note: str = ""


def virtual_time(run: Run) -> VirtualTime | None:
    """The section of a run; None if it has no virtual clock or no round is done."""
    federation = FederationConfig.model_validate(run.config["federation"], context={STORED: True})
    if not federation.devices or not run.num_rounds:
        return None
    setting = describe_federation(federation)
    try:
        done = replay(Recorded.so_far(run.folder, run.loss), federation)
    except (ConfigError, RunFolderError) as error:  # a part or a trace file of one's own that is not there any more
        return VirtualTime(setting, note=str(error))
    figures = (gantt_figure(done), joules_figure(done), loss_figure(done, LOSS_NAMES[run.loss]))
    return VirtualTime(setting, tuple(figure for figure in figures if figure), tuple(waiting_rows(done)))


def describe_federation(federation: FederationConfig) -> str:
    """A federation in a line, without its end."""
    words = [
        f"{_shares(federation.devices)} by {_shares(federation.links)}",
        f"server {federation.server_device} by {federation.server_link}",
        f"policy {_with_options(federation.policy, federation.policy_options)}",
        f"clients there: {_with_options(federation.availability, federation.availability_options)}",
    ]
    if federation.dropout:
        words.append(f"gone in {federation.dropout:.0%} of visits")
    if federation.model:
        words.append(f"as large as {federation.model}")
    return "; ".join([*words, f"electricity of {federation.region}"])


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:g} {name}" if len(shares) > 1 else name for name, share in shares.items())


def _with_options(name: str, options: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{name} ({listed})" if listed else name


def waiting_rows(done: Replay) -> list[dict[str, str]]:
    """A row for each round: who came last, what it did, and how long the others waited for it."""
    rows = []
    for row in done.rounds.to_dict("records"):
        did = (("fine-tuned", "fine_tune"), ("answered", "generate"), ("sent and received", "transfer"))
        work = [f"{word} {format_seconds(row[f'last_{name}_seconds'])}" for word, name in did]
        anybody = row["num_heard"] > 0
        rows.append(
            {
                "round": str(row["round"]),
                "ended": format_seconds(row["hours"] * 3600),
                "took": format_seconds(row["seconds"]),
                "heard": f"{row['num_heard']} of {row['num_asked']}",
                "last": f"client {row['last_client']}, {row['last_device']}" if anybody else "nobody",
                "did": ", ".join(work) if anybody else "",
                "waited": format_seconds(row["waited_for_last_seconds"]),
                "loss": format_number(row["loss"]),
            }
        )
    return rows


def gantt_figure(done: Replay) -> Figure | None:
    """A row for each client, with bars for what it did in virtual time; None if nobody was asked."""
    if done.visits.empty:
        return None
    title, caption = _title(done.rounds), gantt_caption(done)
    svg = render("gantt", title, lambda axes, canvas: _draw_gantt(axes, canvas, done), _gantt_size(done))
    return Figure("gantt", title, caption, svg, wide=True)


def gantt_caption(done: Replay) -> str:
    """What the figure shows, and whom it leaves out."""
    count, shown = done.visits["client_id"].nunique(), len(_shown(done.visits))
    caption = (
        "What each client would do in the federation, calculated from the ledger and profiles of devices and links. "
        "Where there is no bar, it is not asked or not there, or the server is at work. A cross: its answers did not "
        "count."
    )
    return caption + (f" Shown are the {shown} of {count} clients that work longest." if shown < count else "")


def write_gantt(done: Replay, title: str, folder: Path) -> None:
    """Draw timeline.svg and timeline.png in a folder; see `gantt_figure`."""
    width, height = _gantt_size(done)

    def draw(canvas: Canvas) -> None:
        _draw_gantt(canvas.add_subplot(), canvas, done)
        # Under the legend, which takes the first line.
        canvas.suptitle(f"\n{title}: {_title(done.rounds)}", x=0.01, ha="left", fontsize=10, color=INK)
        canvas.supxlabel(textwrap.fill(gantt_caption(done), 170), x=0.01, ha="left", fontsize=8, color=INK)

    for ending in ("svg", "png"):
        save(folder / f"timeline.{ending}", draw, (width, height + 0.7))


def _title(rounds: pd.DataFrame) -> str:
    heard = rounds[rounds["num_heard"] > 0]
    if heard.empty:
        return "Nobody's answers came in time"
    last = heard[heard["last_client"] == heard["last_client"].mode()[0]]
    client, device = last.iloc[0][["last_client", "last_device"]]
    return f"Client {client}, on {device}, was the last to answer in {len(last)} of {len(rounds)} rounds"


def _gantt_size(done: Replay) -> tuple[float, float]:
    rows = len(_shown(done.visits)) + 1
    return 11.6, 1.5 + (0.3 if rows <= 16 else 0.2) * rows


def _shown(visits: pd.DataFrame) -> list[int]:
    """The clients that get a row."""
    busy = visits["fine_tune_seconds"] + visits["generate_seconds"] + visits["uplink_seconds"]
    return sorted(busy.groupby(visits["client_id"]).sum().nlargest(MAX_CLIENTS).index.tolist())


def _draw_gantt(axes: Axes, canvas: Canvas, done: Replay) -> None:
    visits, rounds, shown = done.visits, done.rounds.set_index("round"), _shown(done.visits)
    ends = rounds["hours"] * 3600
    length = max(float(ends.max()), float(visits["ended_at"].max()))
    divisor, unit = time_unit(length)
    bars = _spans(visits, ends - rounds["server_seconds"])
    device = visits.groupby("client_id")["device"].first()

    def draw(row: int, phase: str, spans: pd.DataFrame) -> None:
        # Bars closer than a pixel look like one, and thousands of them would swell the file.
        pairs = [(left, right) for left, right in spans.itertuples(index=False, name=None) if right > left]
        drawn = [(left / divisor, (right - left) / divisor) for left, right in merged(pairs, gap=length / 1500)]
        axes.broken_barh(drawn, (row - 0.38, 0.76), facecolors=PHASES[phase], linewidth=0)

    for row, client in enumerate(shown):
        own = visits["client_id"] == client
        for phase, spans in bars.items():
            draw(row, phase, spans[own])
        lost = visits.loc[own & (visits["counted_in"] == 0), "ended_at"] / divisor
        axes.plot(lost, [row] * len(lost), "x", color=INK, markersize=5)
    draw(len(shown), "server", pd.DataFrame({"left": ends - rounds["server_seconds"], "right": ends}))
    for round, began in [*(ends - rounds["seconds"]).items()][:: -(-len(rounds) // MAX_ROUND_MARKS)]:
        axes.axvline(began / divisor, color=FAINT, linewidth=0.8)
        axes.text(began / divisor, -0.75, f" r{round}", fontsize=8, va="center", clip_on=True)
    axes.set_xlim(0, length * 1.02 / divisor)
    axes.set_ylim(len(shown) + 0.6, -1.1)
    axes.set_yticks(range(len(shown) + 1), [*(f"{client} {device[client]}" for client in shown), "server"])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"virtual time ({unit})")
    patches = [Patch(color=colour, label=phase) for phase, colour in PHASES.items()]
    canvas.legend(handles=patches, loc="outside upper right", ncols=len(patches), handlelength=1.2)


def _spans(visits: pd.DataFrame, closed_at: pd.Series[float]) -> dict[str, pd.DataFrame]:
    """From when until when clients are at what, by visit, in virtual seconds. A visit that breaks off ends there."""
    spans, left = {}, visits["began_at"]
    for phase, names in (
        ("download", ["downlink_seconds"]),
        ("fine-tuning", ["fine_tune_seconds"]),
        ("answering", ["generate_seconds"]),
        ("upload", ["latency_seconds", "uplink_seconds"]),
    ):
        right = (left + visits[names].sum(axis="columns")).clip(upper=visits["ended_at"])
        spans[phase] = pd.DataFrame({"left": left, "right": right})
        left = right
    spans["waiting"] = pd.DataFrame({"left": visits["ended_at"], "right": visits["round"].map(closed_at)})
    return spans


def joules_by_round(done: Replay) -> pd.DataFrame:
    """Joules of each round by what they were for; index round, columns `JOULES`. Idle joules are those of waiting."""
    visits = done.visits
    busy = visits["fine_tune_seconds"] + visits["generate_seconds"]
    trained = (visits["fine_tune_seconds"] / busy).fillna(0.0) * visits["compute_joules"]
    parts = {
        "fine-tuning": trained,
        "answering": visits["compute_joules"] - trained,
        "radio": visits["radio_joules"],
        "waiting": visits["idle_joules"],
    }
    server = done.rounds.set_index("round")["server_joules"].rename("server")
    return pd.DataFrame(parts).groupby(visits["round"]).sum().reindex(server.index, fill_value=0.0).join(server)


def joules_figure(done: Replay) -> Figure:
    """Joules by round and what they were for."""
    table = joules_by_round(done)
    total, top = float(table.to_numpy().sum()), str(table.sum().idxmax())
    divisor, unit = scale(float(table.sum(axis="columns").max()), "J")

    def draw(axes: Axes, canvas: Canvas) -> None:
        stacked_bars(axes, {name: (table[name] / divisor, colour) for name, colour in JOULES.items()})
        axes.set_ylabel(f"energy ({unit})")
        place_legend(canvas, axes, 3)

    title = f"{top.capitalize()} would take {table[top].sum() / (total or 1):.0%} of {format_quantity(total, 'J')}"
    caption = (
        "Joules of clients' devices and radios and of the server, by the round in which clients were asked; "
        f"{done.totals['grams_co2']:.3g} g of CO2. Calculated."
    )
    return Figure("virtual-joules", title, caption, render("virtual-joules", title, draw))


def loss_figure(done: Replay, name: str) -> Figure | None:
    """The loss by virtual time; None if it was measured only once."""
    curve = done.loss_by_hours
    if len(curve) < 2:
        return None
    divisor, unit = time_unit(float(curve.index[-1]) * 3600)

    def draw(axes: Axes, _: Canvas) -> None:
        axes.plot(curve.index * 3600 / divisor, curve, color=BLUE, marker="o")
        axes.set_xlabel(f"virtual time ({unit})")
        axes.set_ylabel(f"mean {name}")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))

    seconds = float(curve.index[int(curve.argmin())]) * 3600
    title = f"Mean {name} was lowest, {curve.min():.3f}, after {format_seconds(seconds)} of virtual time"
    caption = f"Mean {name} over clients, measured, by the virtual time at which its round ended, calculated."
    return Figure("virtual-loss", title, caption, render("virtual-loss", title, draw))


def render_replays(
    summary: pd.DataFrame, sources: Mapping[str, str], loss: Loss, title: str, width: int | None = None
) -> str:
    """What runs cost in a federation, as text: a row for each run, or for each arm of a comparison.

    Args:
        summary: See `studies.replays.Replays.summary`.
        sources: For each column, whether it is measured, scaled or calculated.
        loss: The loss that it has.
        title: Stands above.
        width: In characters; None: the terminal's.
    """
    table = narrow_table()
    table.add_column("run", overflow="fold")
    several = bool((summary["runs"] > 1).any())
    if several:
        table.add_column("seeds", justify="right")
    headings = COSTS | {"loss": f"last {LOSS_NAMES[loss]}"}
    for name, heading in headings.items():
        table.add_column(f"{heading}\n({sources.get(name, CALCULATED)})", justify="right")
    for arm, row in summary.iterrows():
        seeds = [str(row["runs"])] if several else []
        table.add_row(Text(str(arm)), *seeds, *(_cell(name, row) for name in headings))
    note = "± half of the 95% t-interval over seeds. " if several else ""
    return as_text(Text(title), Text(), table, Text(), Text(note + SOURCES_NOTE), width=width).rstrip("\n")


def _cell(name: str, row: pd.Series[Any]) -> str:
    def written(value: float) -> str:
        if name.endswith("joules") or name == "bytes":
            return format_quantity(value, "J" if name.endswith("joules") else "B")
        return format_number(value) if name == "loss" else f"{value:.3g}"

    spread = row[f"{name}_half_width"]
    return written(row[name]) + ("" if pd.isna(spread) else f"\n± {written(spread)}")


def write_quality(summary: pd.DataFrame, rounds: pd.DataFrame, loss: Loss, title: str, folder: Path) -> None:
    """Draw quality.svg and .png in a folder, loss against virtual time, joules and CO2 with Pareto fronts; and
    hours.svg and .png, loss by virtual time, where time to a given loss can be read.

    Args:
        summary: See `studies.replays.Replays.summary`.
        rounds: Mean `hours` and `loss` of each `arm` after each round.
        loss: The loss that they have.
        title: Heading.
        folder: An existing folder.
    """
    arms = summary.assign(half_width=summary["loss_half_width"])
    shown = arms[arms["loss"].notna()]

    def draw_quality(canvas: Canvas) -> None:
        panels = canvas.subplots(1, 3, sharey=True)
        divisor, unit = time_unit(float(shown["hours"].max()) * 3600)
        places = (
            linear_axis(panels[0], shown["hours"] * 3600 / divisor, f"virtual time ({unit})"),
            quantity_axis(panels[1], shown["joules"], "energy", "J"),
            quantity_axis(panels[2], shown["grams_co2"], "CO2", "g"),
        )
        draw_arms(canvas, panels, places, arms, LOSS_NAMES[loss], f"{title}\n")

    def draw_hours(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        divisor, unit = time_unit(float(rounds["hours"].max()) * 3600)
        styles = dict(zip(summary.index, arm_styles(summary["algorithm"].tolist()), strict=True))
        for arm, (colour, marker, face) in styles.items():
            own = rounds[rounds["arm"] == arm].dropna(subset="loss")
            axes.plot(own["hours"] * 3600 / divisor, own["loss"], color=colour, marker=marker, markerfacecolor=face,
                      linewidth=1.2, label=arm)  # fmt: skip
        axes.set_xlabel(f"virtual time ({unit})")
        axes.set_ylabel(f"mean {LOSS_NAMES[loss]}")
        axes.set_xlim(left=0)
        canvas.legend(loc="outside right center")
        canvas.suptitle(f"{title}\n(means over seeds)", x=0.01, ha="left", fontsize=10, color=INK)

    for ending in ("svg", "png"):
        save(folder / f"quality.{ending}", draw_quality, (12.5, max(4.6, 1.0 + 0.21 * len(summary))))
        save(folder / f"hours.{ending}", draw_hours, (9.5, 4.8))


def write_map(panels: Mapping[str, pd.DataFrame], folder: Path, name: str) -> None:
    """Draw ratios as coloured tables, blue below 1 and red above, into a .svg and a .png.

    Args:
        panels: By title, ratios above 0; their rows and columns are the same.
        folder: An existing folder.
        name: The file's name without its ending.
    """
    rows, columns = next(iter(panels.values())).shape

    def draw(canvas: Canvas) -> None:
        for axes, (title, ratios) in zip(canvas.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            axes.imshow(np.log10(ratios), cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -2.0, 2.0), aspect="auto")
            axes.set_xticks(range(columns), ratios.columns, rotation=40, ha="right")
            axes.set_yticks(range(rows), ratios.index)
            axes.grid(False)
            axes.set_title(title, fontsize=10)
            for row, values in enumerate(ratios.to_numpy()):
                for column, ratio in enumerate(values):
                    ink = "white" if abs(math.log10(ratio)) > 1.2 else "black"
                    text = f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)

    for ending in ("svg", "png"):
        save(folder / f"{name}.{ending}", draw, (2.5 + 1.15 * columns, 1.4 + 0.4 * rows))
