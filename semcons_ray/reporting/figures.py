"""Figures of a run as SVG, for the HTML page; each says its finding in its title.

Drawn through matplotlib's figure objects, without pyplot and its global state. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which readers with any colour vision can tell apart; a client has the same colour
and marker in every figure. Text and lines use the page's own ink, so a figure follows its light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from semcons_ray.reporting.tables import (
    STAGES,
    Run,
    agreement,
    busy_share,
    by_round_and_stage,
    bytes_by_round,
    energy,
    format_number,
    format_quantity,
    format_seconds,
    mean_by_round,
    metric_by_round,
    short_model_name,
    wins,
    work_by_stage,
)

CLIENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A2A", "#8C6BB1")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
STAGE_COLOURS = {
    "load": "#8C8C8C",
    "fine_tune": "#D55E00",
    "generate": "#0072B2",
    "embed": "#56B4E9",
    "consensus": "#CC79A7",
    "evaluate": "#009E73",
    "idle": "#C9CDD2",
}
MAX_TIMELINE_WORKERS = 40
# Stand-ins for the page's colours: no other figure colour equals them.
INK, FAINT = "#1d2530", "#9aa3ad"
STYLE = {
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
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        name: Its element's id.
        title: What it shows, as a finding.
        caption: Quantity, unit and where the numbers come from.
        svg: An <svg> element.
        wide: It takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    svg: str
    wide: bool = False


def draw_figures(run: Run) -> list[Figure]:
    """All figures that the run has numbers for, in the order to read them in."""
    drawn = [
        _quality_figure(run, "nll", "test NLL", "Mean negative log-likelihood of the reference answers (nats a token)"),
        _quality_figure(run, "rouge_l", "ROUGE-L", "ROUGE-L F-measure of answers to test prompts (0 to 1)"),
        _quality_figure(run, "similarity", "similarity", "Cosine of answers to the references, by the server's embedding"),
        _wins_figure(run),
        _agreement_figure(run),
        _churn_figure(run),
        _bytes_figure(run),
        _energy_figure(run),
        _timeline_figure(run),
    ]
    return [figure for figure in drawn if figure]


def client_colours(clients: Sequence[int]) -> dict[int, str]:
    """A colour a client; beyond as many as can be told apart, shades in the order of the ids."""
    if len(clients) <= len(CLIENT_COLOURS):
        return dict(zip(clients, CLIENT_COLOURS, strict=False))
    # The ends of the map would vanish on a dark or a light page.
    shades = mpl.colormaps["viridis"](np.linspace(0.15, 0.85, len(clients)))
    return {client: mpl.colors.to_hex(shade) for client, shade in zip(clients, shades, strict=True)}


def _quality_figure(run: Run, metric: str, label: str, caption: str) -> Figure | None:
    values = metric_by_round(run.metrics, metric)
    if values.empty:
        return None
    mean = mean_by_round(run.metrics, metric)
    models = run.metrics.groupby("client_id")["model"].last()
    kinds = sorted(set(models))
    clients = sorted(models.index)
    colours = client_colours(clients)
    few = len(clients) <= len(CLIENT_COLOURS)

    def draw(axes: Axes, canvas: Canvas) -> None:
        for position, client in enumerate(clients):
            if client not in values:
                continue
            measured = values[client].dropna()
            name = f"client {client}" if len(kinds) == 1 else f"{client} · {short_model_name(models[client])}"
            axes.plot(
                measured.index,
                measured,
                color=colours[client],
                linestyle=DASHES[kinds.index(models[client]) % len(DASHES)],
                marker=MARKERS[position] if few else None,
                linewidth=1.6 if few else 0.8,
                alpha=1 if few else 0.7,
                label=name if few else None,
            )
        if len(clients) > 1:
            axes.plot(mean.index, mean, color=INK, linewidth=2.6, label="mean", zorder=1 if few else 3)
        axes.set_ylabel(label)
        _round_axis(axes, values.index)
        if few and len(clients) > 1 and len(kinds) == 1:
            _legend(canvas, axes, 5)
        elif len(clients) > 1:
            _legend(canvas, axes, 2)

    lines = " Round 0 is the base model."
    if len(clients) > 1:
        lines += " The thick line is the mean over clients" + ("." if few else f", thin lines are all {len(clients)}.")
    apart = ""
    if metric == "nll" and len(kinds) > 1:
        apart = " Models differ in their tokens, so compare levels within a model only."
    name = f"Mean {label}" if len(clients) > 1 else label[0].upper() + label[1:]
    title = _quality_title(mean, name, lower_is_better=metric == "nll")
    return _figure(metric, title, f"{caption}, measured.{lines}{apart}", draw)


def _quality_title(mean: pd.Series[float], name: str, *, lower_is_better: bool) -> str:
    first, last = float(mean.iloc[0]), float(mean.iloc[-1])
    digits = 2 if abs(first - last) >= 0.02 else 3
    if len(mean) == 1:
        return f"{name} is {format_number(last, digits)}"
    if format_number(first, digits) == format_number(last, digits):
        title = f"{name} stayed at {format_number(last, digits)}"
    else:
        verb = "fell" if last < first else "rose"
        title = f"{name} {verb} from {format_number(first, digits)} to {format_number(last, digits)}"
    best = mean.idxmin() if lower_is_better else mean.idxmax()
    if best == mean.index[-1] or format_number(mean[best], digits) == format_number(last, digits):
        return title
    at = "in the base model" if best == 0 else f"after round {best}"
    return f"{title}; best {at} ({format_number(mean[best], digits)})"


def _wins_figure(run: Run) -> Figure | None:
    table = wins(run.consensus)
    if table.empty:
        return None
    prompts = run.consensus.groupby("round")["prompt_id"].nunique()
    clients = sorted(set(run.metrics["client_id"]) | set(table.index))
    table = table.reindex(clients, fill_value=0)
    colours = client_colours(clients)
    last = table.columns[-1]
    top = table[last].idxmax()

    def draw_bars(axes: Axes, canvas: Canvas) -> None:
        parts = {f"client {client}": (table.loc[client], colours[client]) for client in clients}
        unlabelled = prompts - table.sum()
        if unlabelled.any():
            parts["no pseudo-label"] = (unlabelled, STAGE_COLOURS["idle"])
        _stacked_bars(axes, parts)
        axes.set_ylabel("public prompts")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(canvas, axes, 5)

    def draw_map(axes: Axes, canvas: Canvas) -> None:
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        axes.grid(False)
        axes.set_ylabel("client")
        axes.set_xlabel("round")
        axes.set_xticks(*_spread(table.columns))
        axes.set_yticks(*_spread(table.index))
        canvas.colorbar(image, ax=axes, label="prompts won", ticks=MaxNLocator(6, integer=True))

    won = f"{table.loc[top, last]} of {prompts[last]} prompts in round {last}"
    if not table[last].any():
        title = f"No prompt gave a pseudo-label in round {last}"
    elif len(clients) > 1 and table.loc[top, last] <= 1.5 * table[last].sum() / len(clients):
        title = f"Wins are spread: no client won more than {won}"
    else:
        title = f"Client {top} won {won}"
    few = len(clients) <= len(CLIENT_COLOURS)
    return _figure(
        "wins",
        title,
        "Public prompts whose pseudo-label is a client's answer, measured. Even shares would be "
        f"{prompts[last] / len(clients):.3g} prompts a client.",
        draw_bars if few else draw_map,
        height=3.4 if few else min(3.4 + 0.03 * len(clients), 6),
    )


def _agreement_figure(run: Run) -> Figure | None:
    if run.consensus.empty:
        return None
    table = agreement(run.consensus)
    threshold = float(run.config["algorithm"]["agreement_threshold"])

    def draw(axes: Axes, canvas: Canvas) -> None:
        boxes = [
            {"whislo": row["q10"], "q1": row["q25"], "med": row["q50"], "q3": row["q75"], "whishi": row["q90"]}
            for _, row in table.iterrows()
        ]
        axes.bxp(
            boxes,
            positions=list(table.index),
            widths=0.5,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "#56B4E9", "edgecolor": "#0072B2", "alpha": 0.6},
            medianprops={"color": INK, "linewidth": 2},
            whiskerprops={"color": "#0072B2"},
            capprops={"color": "#0072B2"},
        )
        axes.plot(table.index, table["mean"], color="#D55E00", marker="D", linestyle="none", label="mean")
        if threshold > 0:
            axes.axhline(threshold, color="#D55E00", linestyle="--", linewidth=1.2, label=f"threshold {threshold:g}")
        axes.set_ylabel("agreement (cosine)")
        _round_axis(axes, table.index, margin=0.6)
        _legend(canvas, axes, 3)

    first, last = table["mean"].iloc[0], table["mean"].iloc[-1]
    if len(table) == 1 or f"{first:.2f}" == f"{last:.2f}":
        title = f"Clients agree at a mean cosine of {format_number(last, 2)}"
    else:
        title = f"Mean agreement {'rose' if last > first else 'fell'} from {format_number(first, 2)} to {format_number(last, 2)}"
    return _figure(
        "agreement",
        title,
        "Agreement of the chosen answer with the others, over public prompts, measured: line at the median, box from "
        "the 25th to the 75th percentile, whiskers at the 10th and the 90th.",
        draw,
    )


def _churn_figure(run: Run) -> Figure | None:
    if run.consensus.empty:
        return None
    abstained = agreement(run.consensus)["abstained"]
    churn = run.rounds.set_index("round")["label_churn"].dropna()

    def draw(axes: Axes, canvas: Canvas) -> None:
        if len(churn):
            axes.plot(churn.index, 100 * churn, color="#D55E00", marker="o", label="label changed since the round before")
        axes.plot(abstained.index, 100 * abstained, color="#0072B2", marker="s", linestyle="--", label="no pseudo-label")
        axes.set_ylim(-3, 103)
        axes.set_ylabel("public prompts (%)")
        _round_axis(axes, abstained.index)
        _legend(canvas, axes, 2)

    last = abstained.index[-1]
    if len(churn):
        title = f"The pseudo-label of {churn.iloc[-1]:.0%} of prompts changed in round {churn.index[-1]}"
    else:
        title = f"{abstained.iloc[-1]:.0%} of prompts gave no pseudo-label in round {last}"
    caption = (
        "Label churn, the share of public prompts whose pseudo-label is not what it was a round before (first known in "
        "round 2), and the share that gave none; measured. Zero churn means that labels settled, not that they are right."
    )
    return _figure("churn", title, caption, draw)


def _bytes_figure(run: Run) -> Figure | None:
    table = bytes_by_round(run.ledger)
    total = table["total_bytes"].sum()
    if total == 0:
        return None
    scale, unit = _scale(float(table["total_bytes"].max()), "B")

    def draw(axes: Axes, canvas: Canvas) -> None:
        _stacked_bars(
            axes,
            {
                "uplink (answers)": (table["uplink_bytes"] / scale, "#0072B2"),
                "downlink (pseudo-labels)": (table["downlink_bytes"] / scale, "#E69F00"),
            },
        )
        axes.set_ylabel(f"all clients ({unit})")
        _legend(canvas, axes, 2)

    a_round = format_quantity(total / len(table), "B")
    return _figure(
        "bytes",
        f"{a_round} a round crossed the wire",
        f"Length of encoded messages, all clients together, measured; {format_quantity(total, 'B')} over the run "
        f"(kB = 1000 B). Compression: {run.config['algorithm']['compression']}.",
        draw,
    )


def _energy_figure(run: Run) -> Figure | None:
    joules, source = energy(run.ledger)
    if not joules > 0:
        return None
    table = by_round_and_stage(run.ledger, "energy_joules")
    table = table.loc[:, table.sum() > 0]
    scale, unit = _scale(float(table.sum(axis="columns").max()), "J")

    def draw(axes: Axes, canvas: Canvas) -> None:
        parts = {stage.replace("_", "-"): (table[stage] / scale, STAGE_COLOURS[stage]) for stage in table}
        _stacked_bars(axes, parts)
        axes.set_ylabel(f"energy ({unit}, {source.split(',')[0]})")
        _legend(canvas, axes, 4)

    sums = table.sum()
    top = sums.idxmax()
    return _figure(
        "energy",
        f"{_stage_name(top)} took {sums[top] / sums.sum():.0%} of {format_quantity(joules, 'J')} ({source})",
        f"Energy by round and kind of work, {source}. Round 0 is set-up.",
        draw,
    )


def _timeline_figure(run: Run) -> Figure | None:
    work = run.ledger[(run.ledger["stage"] != "idle") & (run.ledger["duration_seconds"] > 0)]
    if work.empty:
        return None
    seconds = work.groupby("worker")["duration_seconds"].sum()
    shown = sorted(seconds.nlargest(MAX_TIMELINE_WORKERS).index, key=_natural)
    start = float(work["started_at"].min())
    spans = [(left - start, right - start) for left, right in zip(work["started_at"], work["started_at"] + work["duration_seconds"], strict=True)]  # fmt: skip
    squeeze, pauses, length = _without_pauses(spans)
    divisor, unit = (1.0, "s") if length < 300 else (60.0, "min") if length < 3 * 3600 else (3600.0, "h")
    busy = busy_share(run.ledger)
    stages = [stage for stage in STAGES if stage in set(work["stage"])]

    def draw(axes: Axes, canvas: Canvas) -> None:
        for row, worker in enumerate(shown):
            for stage in stages:
                rows = work[(work["worker"] == worker) & (work["stage"] == stage)]
                bars = _merged(rows["started_at"] - start, rows["duration_seconds"], gap=length / 1500)
                axes.broken_barh(
                    [(squeeze(left) / divisor, (squeeze(right) - squeeze(left)) / divisor) for left, right in bars],
                    (row - 0.38, 0.76),
                    facecolors=STAGE_COLOURS[stage],
                    linewidth=0,
                    label=stage.replace("_", "-") if row == 0 else None,
                )
        rounds = run.rounds[run.rounds["round"] > 0]
        for round, began in list(zip(rounds["round"], rounds["started_at"], strict=True))[:: math.ceil(len(rounds) / 20) or 1]:
            position = squeeze(began - start) / divisor
            axes.axvline(position, color=FAINT, linewidth=0.8)
            axes.text(position, -0.75, f" r{round}", fontsize=8, va="center")
        for position, lasted in pauses:
            axes.axvline(position / divisor, color="#D55E00", linestyle="--", linewidth=1.2)
            axes.text(position / divisor, len(shown) - 0.15, f" stopped {format_seconds(lasted)}", fontsize=8, color="#D55E00")
        for row, worker in enumerate(shown):
            if not math.isnan(busy.get(worker, math.nan)):
                axes.text(length * 1.01 / divisor, row, f"{busy[worker]:.0%}", va="center", fontsize=8)
        axes.set_xlim(0, length * 1.06 / divisor)
        axes.set_ylim(len(shown) + (0.1 if pauses else -0.4), -1.1)
        axes.set_yticks(range(len(shown)), shown)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"time since the first work ({unit})")
        patches = [mpl.patches.Patch(color=STAGE_COLOURS[stage], label=stage.replace("_", "-")) for stage in stages]
        canvas.legend(handles=patches, loc="outside upper left", ncols=len(stages), fontsize=9, handlelength=1.2)

    table = work_by_stage(work)
    top = table["share"].idxmax()
    idle = run.ledger.loc[run.ledger["stage"] == "idle", "duration_seconds"].sum()
    worked = work.loc[work["worker"].isin(busy.dropna().index), "duration_seconds"].sum()
    share = f"; workers were busy {worked / (worked + idle):.0%} of the time" if worked + idle > 0 else ""
    left_out = f" The {len(shown)} workers with most work of {len(seconds)} are shown." if len(shown) < len(seconds) else ""
    return _figure(
        "timeline",
        f"{_stage_name(top)} took {table['share'][top]:.0%} of work time{share}",
        "Every piece of work by worker, timed by its machine's own clock; gaps are idle time. At the right, the share of "
        f"a worker's time that it was busy; rounds begin at the marks r1, r2, … Measured.{left_out}",
        draw,
        size=(11.6, 1.5 + (0.3 if len(shown) <= 16 else 0.2) * len(shown)),
        wide=True,
    )


def _without_pauses(
    spans: Sequence[tuple[float, float]],
) -> tuple[Callable[[float], float], list[tuple[float, float]], float]:
    """A time axis that leaves out when nobody worked for long: a run that was stopped and resumed later.

    Returns:
        A map from seconds to seconds on the axis; each pause as its place on the axis and its length; the axis's end.
    """
    busy = sum(right - left for left, right in _merged_spans(spans))
    pauses: list[tuple[float, float]] = []
    end = 0.0
    for left, right in _merged_spans(spans):
        if left - end > max(60.0, busy):
            pauses.append((end, left))
        end = right

    def squeeze(seconds: float) -> float:
        return seconds - sum(min(max(seconds - left, 0.0), right - left) for left, right in pauses)

    return squeeze, [(squeeze(left), right - left) for left, right in pauses], squeeze(end)


def _merged_spans(spans: Sequence[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for left, right in sorted(spans):
        if merged and left - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], right))
        else:
            merged.append((left, right))
    return merged


def _merged(starts: pd.Series[float], seconds: pd.Series[float], gap: float) -> list[tuple[float, float]]:
    # Bars closer than a pixel look like one, and thousands of them would swell the page.
    return _merged_spans(list(zip(starts, starts + seconds, strict=True)), gap)


def _stacked_bars(axes: Axes, parts: dict[str, tuple[pd.Series[Any], str]]) -> None:
    rounds = next(iter(parts.values()))[0].index
    bottom = pd.Series(0.0, index=rounds)
    for label, (heights, colour) in parts.items():
        axes.bar(rounds, heights, 0.7, bottom=bottom, color=colour, label=label, linewidth=0)
        bottom = bottom + heights
    axes.grid(False, axis="x")
    _round_axis(axes, rounds, margin=0.6)


def _round_axis(axes: Axes, rounds: Any, margin: float = 0.25) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(min(rounds) - margin, max(rounds) + margin)
    axes.set_xticks(*_spread_rounds(list(rounds)))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _spread_rounds(rounds: list[int]) -> tuple[list[int], list[str]]:
    step = math.ceil((max(rounds) - min(rounds) + 1) / 12)
    ticks = list(range(min(rounds), max(rounds) + 1, step))
    return ticks, [str(tick) for tick in ticks]


def _spread(labels: Any) -> tuple[list[int], list[str]]:
    step = math.ceil(len(labels) / 12)
    return list(range(0, len(labels), step)), [str(label) for label in labels[::step]]


def _legend(canvas: Canvas, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9, handlelength=1.4,
                      columnspacing=1.1, borderaxespad=0.1)  # fmt: skip


def _scale(largest: float, unit: str) -> tuple[float, str]:
    power = min(max(int(math.log10(largest)) // 3, 0), 4) if largest > 0 else 0
    return 1000.0**power, ("", "k", "M", "G", "T")[power] + unit


def _stage_name(stage: Any) -> str:
    names = {"load": "Loading models", "fine_tune": "Fine-tuning", "generate": "Generating answers",
             "embed": "Embedding", "consensus": "Forming the consensus", "evaluate": "Evaluation"}  # fmt: skip
    return names.get(stage, str(stage))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _figure(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Axes, Canvas], None],
    *,
    height: float = 3.4,
    size: tuple[float, float] | None = None,
    wide: bool = False,
) -> Figure:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=size or (5.8, height), layout="constrained")
        draw(canvas.add_subplot(), canvas)
        stream = io.StringIO()
        FigureCanvasSVG(canvas).print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Figure(name, title, caption, _inline(stream.getvalue(), name, title), wide)


def _inline(svg: str, name: str, title: str) -> str:
    """Fit matplotlib's file into a page: no prolog, ids of its own, a label for screen readers, the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, f"var(--ink, {INK})").replace(FAINT, f"var(--faint, {FAINT})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
