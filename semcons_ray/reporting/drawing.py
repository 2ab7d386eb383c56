"""Drawing of figures: style, colours, axes, and SVG for a page.

Drawn through matplotlib's figure objects, without pyplot and its global state. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which readers with any colour vision can tell apart; a client has the same colour
and marker in every figure. Text and lines use the page's own ink, so a figure follows its light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from semcons_ray.errors import ConfigError
from semcons_ray.metering.units import format_mark

CLIENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A2A", "#8C6BB1")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BLUE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#56B4E9", "#C9CDD2"
STAGE_COLOURS = {
    "load": "#8C8C8C",
    "fine_tune": "#D55E00",
    "generate": "#0072B2",
    "embed": "#56B4E9",
    "consensus": "#CC79A7",
    "encode": "#E69F00",
    "aggregate": "#8C6BB1",
    "evaluate": "#009E73",
    "idle": GREY,
}
STAGE_NAMES = {
    "load": "Loading models",
    "fine_tune": "Fine-tuning",
    "generate": "Generating answers",
    "embed": "Embedding",
    "consensus": "Forming the consensus",
    "encode": "Encoding weights",
    "aggregate": "Aggregating weights",
    "evaluate": "Evaluation",
}
# Stand-ins for the page's colours: no other colour of a figure equals them.
INK, FAINT = "#1d2530", "#9aa3ad"
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Figure:
    """A figure of an HTML page.

    Attributes:
        name: Its name, which is part of its element's id.
        title: Its finding in one sentence.
        caption: Quantity, unit and where the numbers come from.
        svg: An <svg> element.
        wide: Whether it takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    svg: str
    wide: bool = False


def render(name: str, title: str, draw: Callable[[Axes, Canvas], None], size: tuple[float, float] = (5.8, 3.4)) -> str:
    """An <svg> element of `size` inches, drawn by `draw`; the same numbers give the same text."""
    stream = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Matplotlib measures text in its own font; the page sets it in the reader's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.add_subplot(), canvas)
        canvas.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(stream.getvalue(), name, title)


def save(path: Path, draw: Callable[[Canvas], None], size: tuple[float, float] = (7.2, 4.4)) -> None:
    """Draw a figure of `size` inches on white to a .svg or .png file; the same numbers give the same file.

    Raises:
        ConfigError: The file has another ending.
    """
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"{path}: a figure's file must end in .svg or .png")
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.name, "savefig.facecolor": "white"}):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas)
        stream = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type") if path.suffix == ".svg" else ("Software",))
        canvas.savefig(stream, format=path.suffix[1:], dpi=150, metadata=metadata)
    path.write_bytes(stream.getvalue())


def _inline(svg: str, name: str, title: str) -> str:
    """Fit matplotlib's file into a page: no prolog, ids of its own, a label for screen readers, the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, f"var(--ink, {INK})").replace(FAINT, f"var(--faint, {FAINT})")
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(title)}">{rest}'


def client_colours(clients: Sequence[int]) -> dict[int, str]:
    """A colour for each client; for more clients than can be told apart, shades in the order of their ids."""
    if few(clients):
        return dict(zip(clients, CLIENT_COLOURS, strict=False))
    # The ends of the map would vanish on a dark or a light page.
    shades = mpl.colormaps["viridis"](np.linspace(0.15, 0.85, len(clients)))
    return {client: mpl.colors.to_hex(shade) for client, shade in zip(clients, shades, strict=True)}


def few(clients: Sequence[int]) -> bool:
    """Whether each client can have a colour and a marker of its own."""
    return len(clients) <= len(CLIENT_COLOURS)


def stage_label(stage: str) -> str:
    """A stage's name in a legend."""
    return stage.replace("_", "-")


def stacked_bars(axes: Axes, parts: Mapping[str, tuple[pd.Series[Any], str]]) -> None:
    """Stacked bars by round; `parts` gives heights by round and a colour for each label, from the bottom up."""
    rounds = next(iter(parts.values()))[0].index
    bottom = pd.Series(0.0, index=rounds)
    for label, (heights, colour) in parts.items():
        axes.bar(rounds, heights, 0.7, bottom=bottom, color=colour, label=label, linewidth=0)
        bottom = bottom + heights
    axes.grid(False, axis="x")
    round_axis(axes, rounds, margin=0.6)


def round_axis(axes: Axes, rounds: Any, margin: float = 0.25) -> None:
    """Label the x-axis with rounds, and the y-axis with a few round numbers."""
    axes.set_xlabel("round")
    axes.set_xlim(min(rounds) - margin, max(rounds) + margin)
    every = range(min(rounds), max(rounds) + 1)
    axes.set_xticks(every[:: math.ceil(len(every) / 12)])
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def log_axis(axes: Axes, name: Literal["x", "y"], unit: str = "") -> None:
    """Make an axis logarithmic, with a tick at each power of ten; a unit gets SI prefixes."""

    def label(value: float, _: float) -> str:
        return format_mark(value, unit) if unit else f"{value:g}"

    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(numticks=12))
    axis.set_major_formatter(label)
    axis.set_minor_formatter(NullFormatter())


def place_legend(canvas: Canvas, axes: Axes, columns: int) -> None:
    """Put a legend above the axes, if anything has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        canvas.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=columns,
            handlelength=1.4,
            columnspacing=1.1,
            borderaxespad=0.1,
        )
