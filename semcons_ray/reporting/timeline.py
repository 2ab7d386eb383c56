"""The timeline of a run: every worker's work on one time axis."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from semcons_ray.metering.ledger import Span, merged
from semcons_ray.reporting.drawing import (
    FAINT,
    ORANGE,
    STAGE_COLOURS,
    STAGE_NAMES,
    Figure,
    render,
    stage_label,
)
from semcons_ray.reporting.tables import STAGES, Run, busy_share, format_seconds, work_by_stage

MAX_WORKERS = 40
MAX_ROUND_MARKS = 20


def timeline_figure(run: Run) -> Figure | None:
    """A row for each worker, with a bar for each piece of work; None if there was no work."""
    work = run.ledger[(run.ledger["stage"] != "idle") & (run.ledger["duration_seconds"] > 0)]
    if work.empty:
        return None
    seconds = work.groupby("worker")["duration_seconds"].sum()
    shown = sorted((str(worker) for worker in seconds.nlargest(MAX_WORKERS).index), key=_natural)
    start = float(work["started_at"].min())
    squeeze, pauses, length = without_pauses(_spans(work, start))
    divisor, unit = time_unit(length)
    busy = busy_share(run.ledger)
    stages = [stage for stage in STAGES if stage in set(work["stage"])]
    rounds = run.rounds[run.rounds["round"] > 0]
    marks = list(zip(rounds["round"], rounds["started_at"], strict=True))
    marks = marks[:: max(1, math.ceil(len(marks) / MAX_ROUND_MARKS))]

    def place(seconds: float) -> float:
        return squeeze(seconds) / divisor

    def draw(axes: Axes, canvas: Canvas) -> None:
        for row, worker in enumerate(shown):
            for stage in stages:
                rows = work[(work["worker"] == worker) & (work["stage"] == stage)]
                # Bars closer than a pixel look like one, and thousands of them would swell the page.
                bars = merged(_spans(rows, start), gap=length / 1500)
                drawn = [(place(left), place(right) - place(left)) for left, right in bars]
                axes.broken_barh(drawn, (row - 0.38, 0.76), facecolors=STAGE_COLOURS[stage], linewidth=0)
            if not math.isnan(busy[worker]):
                axes.text(length * 1.01 / divisor, row, f"{busy[worker]:.0%}", va="center", fontsize=8)
        for round, began in marks:
            # Clipped: the driver's clock says when a round begins, and may be off the workers' axis.
            axes.axvline(place(began - start), color=FAINT, linewidth=0.8)
            axes.text(place(began - start), -0.75, f" r{round}", fontsize=8, va="center", clip_on=True)
        for left, right in pauses:
            note = f" stopped {format_seconds(right - left)}"
            axes.axvline(place(left), color=ORANGE, linestyle="--", linewidth=1.2)
            axes.text(place(left), len(shown) - 0.15, note, fontsize=8, color=ORANGE)
        axes.set_xlim(0, length * 1.06 / divisor)
        axes.set_ylim(len(shown) + (0.1 if pauses else -0.4), -1.1)
        axes.set_yticks(range(len(shown)), shown)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"time since the first work ({unit})")
        patches = [Patch(color=STAGE_COLOURS[stage], label=stage_label(stage)) for stage in stages]
        canvas.legend(handles=patches, loc="outside upper left", ncols=len(stages), handlelength=1.2)

    title = _title(run.ledger)
    caption = (
        "Every piece of work by worker, timed by its machine's own clock; gaps are idle time. At the right, the share "
        "of a worker's time that it was busy; rounds begin at the marks r1, r2, … Measured."
    )
    if len(shown) < len(seconds):
        caption += f" Shown are the {len(shown)} of {len(seconds)} workers with most work."
    size = (11.6, 1.5 + (0.3 if len(shown) <= 16 else 0.2) * len(shown))
    return Figure("timeline", title, caption, render("timeline", title, draw, size), wide=True)


def time_unit(seconds: float) -> tuple[float, str]:
    """The divisor and the unit that suit an axis of so many seconds."""
    return (1.0, "s") if seconds < 300 else (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _title(ledger: pd.DataFrame) -> str:
    stages = work_by_stage(ledger[ledger["stage"] != "idle"])
    top = str(stages["share"].idxmax())
    title = f"{STAGE_NAMES[top]} took {stages['share'].max():.0%} of work time"
    metered = ledger[ledger["worker"].isin(ledger.loc[ledger["stage"] == "idle", "worker"])]
    metered = metered[metered["worker"] != "server"]  # it waits for clients by design, and takes no core
    total = metered["duration_seconds"].sum()
    if not total > 0:
        return title
    idle = metered.loc[metered["stage"] == "idle", "duration_seconds"].sum()
    return f"{title}; workers were busy {1 - idle / total:.0%} of the time"


def without_pauses(spans: Sequence[Span]) -> tuple[Callable[[float], float], list[Span], float]:
    """A time axis without long pauses, in which a run was stopped until it was resumed.

    A pause is longer than a minute, and longer than all the time in which anybody worked.

    Returns:
        A map from seconds to seconds on the axis; the pauses, in seconds; and where the axis ends.
    """
    stretches = merged(spans)
    longest = max(60.0, sum(right - left for left, right in stretches))
    pauses = [(before[1], after[0]) for before, after in pairwise(stretches) if after[0] - before[1] > longest]

    def squeeze(seconds: float) -> float:
        return seconds - sum(min(max(seconds - left, 0.0), right - left) for left, right in pauses)

    return squeeze, pauses, squeeze(stretches[-1][1])


def _spans(rows: pd.DataFrame, start: float) -> list[Span]:
    left = rows["started_at"] - start
    return list(zip(left.tolist(), (left + rows["duration_seconds"]).tolist(), strict=True))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
