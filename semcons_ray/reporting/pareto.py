"""Quality against cost: a figure of a comparison's arms over bytes, seconds and joules, with Pareto fronts."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from semcons_ray.config import AlgorithmConfig
from semcons_ray.metering.units import format_mark, format_quantity, scale
from semcons_ray.parts import BUILT_IN
from semcons_ray.reporting.drawing import BLUE, FAINT, INK, MARKERS, ORANGE, save
from semcons_ray.reporting.summary import compared_by
from semcons_ray.runs.run_folder import LOSS_NAMES

ANSWERS, WEIGHTS, NOTHING, OTHERS = BLUE, ORANGE, "#009E73", "#CC79A7"
"""Colours of built-in algorithms, by what they exchange, and of others."""
NOT_FEDERATED = ("centralized",)
"""Bounds that no federation can be expected to reach: they are drawn, but left out of Pareto fronts."""
SIZE = 8.0

Style = tuple[str, str, str]
"""Colour, marker, and the colour with which the marker is filled."""


def pareto_front(costs: pd.Series[float], losses: pd.Series[float]) -> list[str]:
    """The arms that no other arm beats, from the cheapest to the best.

    An arm beats another if neither its cost nor its loss is higher, and one of them is lower. Of arms that are equal in
    both, the first is kept. Arms whose cost or loss is not finite are left out.
    """
    finite = [str(arm) for arm in costs.index if math.isfinite(costs[arm]) and math.isfinite(losses[arm])]
    front: list[str] = []
    for arm in sorted(finite, key=lambda arm: (costs[arm], losses[arm])):
        if not front or losses[arm] < losses[front[-1]]:
            front.append(arm)
    return front


def write_pareto(summary: pd.DataFrame, title: str, folder: Path) -> None:
    """Draw pareto.svg and pareto.png in a folder; the same numbers give the same files.

    Args:
        summary: See `comparison.summarize`.
        title: Heading of the figure.
        folder: An existing folder.
    """
    size = (12.5, max(4.6, 1.0 + 0.21 * len(summary)))
    with warnings.catch_warnings():
        # Matplotlib measures text in its own font; the viewer of the SVG has others.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        for ending in ("svg", "png"):
            save(folder / f"pareto.{ending}", lambda canvas: _draw(canvas, summary, title), size)


def _draw(canvas: Canvas, summary: pd.DataFrame, title: str) -> None:
    name = compared_by(summary)
    arms = summary.assign(loss=summary[name], half_width=summary[f"{name}_half_width"])
    shown = arms[arms["loss"].map(math.isfinite)]
    panels = canvas.subplots(1, 3, sharey=True)
    sources = "; ".join(dict.fromkeys(summary["energy_source"]))
    places = (
        _bytes_axis(panels[0], shown["bytes"]),
        quantity_axis(panels[1], shown["seconds"], "time at work", "s"),
        quantity_axis(panels[2], shown["joules"], f"energy, {sources}", "J"),
    )
    draw_arms(canvas, panels, places, arms, LOSS_NAMES[name], title)


def draw_arms(
    canvas: Canvas,
    panels: Sequence[Axes],
    places: Sequence[pd.Series[float]],
    arms: pd.DataFrame,
    loss: str,
    title: str,
) -> None:
    """Draw arms by loss and several costs, a panel each, with Pareto fronts and a legend.

    Args:
        canvas: The figure.
        panels: Its panels, which share the y-axis.
        places: For each panel, where on its x-axis the arms are whose loss is known.
        arms: Index arm; columns algorithm, loss and half_width, of the loss's 95% interval.
        loss: Name of the loss.
        title: Heading of the figure.
    """
    styles = dict(zip(arms.index, arm_styles(arms["algorithm"].tolist()), strict=True))
    shown = arms[arms["loss"].map(math.isfinite)]
    _loss_axis(panels[0], shown, loss)
    # In the order of the markers from the top down, so that the eye finds its way.
    handles = [_handle(arm, styles[arm]) for arm in arms["loss"].sort_values(ascending=False).index]
    handles.append(Line2D([], [], color=FAINT, label="Pareto front"))
    canvas.legend(handles=handles, loc="outside right center", handlelength=1.4, labelspacing=0.45)
    bars = "bars: 95% t-interval over seeds; " if arms["half_width"].notna().any() else ""
    heading = f"{title} ({bars}markers that would hide each other are set apart)"
    canvas.suptitle(heading, x=0.01, ha="left", fontsize=10, color=INK)
    canvas.draw_without_rendering()  # places the axes, so that positions of markers are known
    losses, half_width = shown["loss"].to_dict(), shown["half_width"].to_dict()
    federated = shown[~shown["algorithm"].isin(NOT_FEDERATED)].index
    for axes, place in zip(panels, places, strict=True):
        front = pareto_front(place[federated], shown["loss"])
        for arm, x in _dodged(axes, place, shown["loss"], front).items():
            _draw_arm(axes, x, losses[arm], half_width[arm], styles[arm])
        if front:
            steps = [*((place[arm], losses[arm]) for arm in front), (axes.get_xlim()[1], losses[front[-1]])]
            axes.step(*zip(*steps, strict=True), where="post", color=FAINT, zorder=0)


def _draw_arm(axes: Axes, x: float, loss: float, half_width: float, style: Style) -> None:
    colour, marker, face = style
    if not math.isnan(half_width):
        axes.vlines(x, loss - half_width, loss + half_width, color=colour, linewidth=0.9, alpha=0.6, zorder=1)
    edge, width = ("white", 0.4) if face == colour else (colour, 1.2)
    axes.plot(x, loss, marker, markersize=SIZE, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width)


def _handle(arm: str, style: Style) -> Line2D:
    colour, marker, face = style
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, markersize=SIZE, linewidth=0, label=arm)


def _loss_axis(axes: Axes, shown: pd.DataFrame, name: str) -> None:
    widths = shown["half_width"].fillna(0.0)
    low, high = (shown["loss"] - widths).min(), (shown["loss"] + widths).max()
    margin = 0.05 * (high - low) or 0.1
    if not shown.empty:
        axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel(f"mean {name} after the last round")
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))


def _dodged(axes: Axes, x: pd.Series[float], y: pd.Series[float], first: Sequence[str]) -> dict[str, float]:
    """The x-position at which to draw each arm: moved a little if another would hide it. `first` are not moved."""
    step = SIZE / 72 * axes.figure.dpi / 2
    placed: list[tuple[float, float]] = []
    drawn = {}
    for arm in [*first, *(arm for arm in x.dropna().index if arm not in first)]:
        across, up = axes.transData.transform((x[arm], y[arm]))
        for shift in (0, 1, -1, 2, -2, 3, -3, 4, -4):
            near = across + shift * step
            if all(math.hypot(near - other, up - height) >= 1.2 * step for other, height in placed):
                break
        placed.append((near, up))
        drawn[arm] = float(axes.transData.inverted().transform((near, up))[0]) if near != across else x[arm]
    return drawn


def arm_styles(algorithms: Sequence[str]) -> list[Style]:
    """A style for each arm, by its algorithm; up to 24 arms of one colour all look different."""
    seen: Counter[str] = Counter()
    styles: list[Style] = []
    for algorithm in algorithms:
        colour = _colour(algorithm)
        turn, position = divmod(seen[colour], len(MARKERS))
        red, green, blue = (0.4 * part + 0.6 for part in to_rgb(colour))
        faces = (colour, "white", to_hex((red, green, blue)))
        styles.append((colour, MARKERS[position], faces[turn % len(faces)]))
        seen[colour] += 1
    return styles


def _colour(algorithm: str) -> str:
    if algorithm not in BUILT_IN["algorithm"]:
        return OTHERS
    settings = AlgorithmConfig(name=algorithm)
    says = settings.forms_consensus or settings.exchanges_tokens
    return WEIGHTS if settings.averages_weights else ANSWERS if says else NOTHING


def quantity_axis(axes: Axes, values: pd.Series[float], label: str, unit: str) -> pd.Series[float]:
    """A linear axis from 0 of a quantity with SI prefixes; returns where each arm is on it."""
    divisor, unit = scale(float(values.max()) if values.notna().any() else 0.0, unit)
    return linear_axis(axes, values / divisor, f"{label} ({unit})")


def linear_axis(axes: Axes, values: pd.Series[float], label: str) -> pd.Series[float]:
    """A linear axis from 0, which has these values; returns them."""
    axes.set_xlabel(label)
    axes.set_xlim(0, float(values.max()) * 1.08 if values.max() > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return values


def _bytes_axis(axes: Axes, values: pd.Series[float]) -> pd.Series[float]:
    """A logarithmic axis with a separate place for 0 at the left; returns where each arm is on it."""
    axes.set_xlabel("bytes on the wire")
    sent = values[values > 0]
    low, high = (math.log10(sent.min()), math.log10(sent.max())) if len(sent) else (0.0, 0.0)
    span = max(high - low, 0.5)
    nothing = 10 ** (low - 0.17 * span)
    steps = (1, 2, 5) if span < 1.5 else (1,)
    marks = [step * 10**power for power in range(math.floor(low) - 1, math.ceil(high) + 1) for step in steps]
    marks = [mark for mark in marks if low - 0.06 * span <= math.log10(mark) <= high + 0.06 * span]
    ticks = {float(mark): format_mark(mark, "B") for mark in marks[:: math.ceil(len(marks) / 5) or 1]}
    if len(ticks) < 2:
        ticks = {10**power: format_quantity(10**power, "B") for power in (low, high)}
    if len(sent) < len(values):
        ticks = {nothing: "0", **(ticks if len(sent) else {})}
        axes.axvline(10 ** (low - 0.1 * span), color=FAINT, linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - (0.24 if len(sent) < len(values) else 0.08) * span), 10 ** (high + 0.08 * span))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(ticks), list(ticks.values()))
    return values.where(values > 0, nothing)
