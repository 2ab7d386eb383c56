"""The summary of a comparison as text: a table for the terminal, and one in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from semcons_ray.evaluation.bootstrap import NUM_RESAMPLES
from semcons_ray.metering.units import format_quantity
from semcons_ray.reporting.comparison import LOSS_COLUMNS
from semcons_ray.reporting.intervals import ARM_COLUMNS
from semcons_ray.reporting.tables import format_interval, format_number, format_seconds, format_usd
from semcons_ray.reporting.terminal import as_text, narrow_table
from semcons_ray.runs.run_folder import LOSS_NAMES, Loss

NO_METRICS = pd.DataFrame(columns=list(ARM_COLUMNS))
INTERVALS_NOTE = (
    "±: half of the 95% t-interval over seeds. [95% intervals]: over test questions, by "
    f"{NUM_RESAMPLES:,} bootstrap draws of as many. vs first is paired by seed and question."
)
LEFT_OUT = ("worst client", "similarity", "a client and round")
"""Columns of `summary_cells` left out on a terminal for want of room; so is the loss by which arms are not compared."""


def summary_cells(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as texts under short headings, a row for each arm; the loss by which arms are compared comes
    first."""
    loss = compared_by(summary)
    other: Loss = "bits_per_byte" if loss == "nll" else "nll"
    most = summary["seeds"].max()
    rows = []
    for position, (arm, row) in enumerate(summary.iterrows()):
        rows.append(
            {
                "arm": f"{arm}{_remarks(row, most)}",
                LOSS_NAMES[loss]: _interval(row[loss], row[f"{loss}_half_width"]),
                "worst client": format_number(row[LOSS_COLUMNS[loss][1]]),
                LOSS_NAMES[other]: _interval(row[other], row[f"{other}_half_width"]),
                "vs first": _interval(row["difference"], row["difference_half_width"], signed=True)
                if position
                else "–",
                "gap closed": format_number(100 * row["gap_closed"], 0)
                + ("" if math.isnan(row["gap_closed"]) else "%"),
                "at equal bytes": format_number(row["at_equal_bytes"]),
                "ROUGE-L": format_number(row["rouge_l"]),
                "similarity": format_number(row["similarity"]),
                "bytes": format_quantity(row["bytes"], "B"),
                "a client and round": format_quantity(row["bytes_per_visit"], "B"),
                "fewer": _ratio(row["bytes_ratio"]),
                "time": format_seconds(row["seconds"]),
                "energy": format_quantity(row["joules"], "J"),
                "paid": format_usd(row["cost_usd"]),
            }
        )
    return pd.DataFrame(rows).drop(columns=[] if summary["cost_usd"].any() else ["paid"])


def metric_cells(metrics: pd.DataFrame, parts: Sequence[str] = ("value", "difference")) -> pd.DataFrame:
    """Metrics of arms with their intervals as texts, a row for each arm; see `arm_intervals`.

    Args:
        metrics: The metrics.
        parts: Which of them: the values, the differences to the first arm, or both.
    """
    cells = pd.DataFrame(index=pd.Index(metrics["arm"].unique(), name="arm"))
    for label, rows in metrics.groupby("label", sort=False):
        of_arm = rows.set_index("arm")
        for part in parts:
            signed = part == "difference"
            texts = {arm: format_interval(row, part, signed=signed) for arm, row in of_arm.iterrows()}
            cells[f"{label} vs first" if signed else str(label)] = pd.Series(texts).reindex(cells.index, fill_value="–")
    return cells.reset_index()


def compared_by(summary: pd.DataFrame) -> Loss:
    """The loss by which the arms of a summary are compared."""
    loss: Loss = summary["loss"].iloc[0]
    return loss


def _remarks(row: pd.Series[Any], most: int) -> str:
    remarks = [f"{row['seeds']} of {most} seeds"] if row["seeds"] < most else []
    if row["failed"]:
        remarks.append(f"{row['failed']} visit{'s' if row['failed'] > 1 else ''} failed")
    return f" ({', '.join(remarks)})" if remarks else ""


def _interval(mean: float, half_width: float, *, signed: bool = False) -> str:
    return format_number(mean, signed=signed) + ("" if math.isnan(half_width) else f" ± {format_number(half_width)}")


def _ratio(value: float) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    return f"{value:,.0f}×" if value >= 9.95 else f"{value:.2g}×"


def notes(summary: pd.DataFrame, *, reference: str, baseline: str) -> list[str]:
    """Explanations of the columns, one line each."""
    first, most, loss = summary.index[0], summary["seeds"].max(), compared_by(summary)
    name = LOSS_NAMES[loss].removeprefix("test ")
    lines = [f"Means over {most} seeds, ± half of the 95% t-interval." if most > 1 else "One seed: no spread is known."]
    if loss != "nll":
        lines.append("Models differ in their tokens, so arms are compared in bits per byte of the test set's answers.")
    if summary["untold"].any():
        names = ", ".join(f"{arm} without {count}" for arm, count in summary["untold"].items() if count)
        lines.append(f"Not all clients' models tell likelihoods; {name} is the mean over those that do: {names}.")
    if len(summary) > 1 and summary["difference"].notna().any():
        lines.append(f"vs first: {name} less that of {first}, seed by seed; below 0 is better.")
        lines.append(f"at equal bytes: {name} when no more was sent than by {first} in all.")
    if reference in summary.index:
        lines.append(f"fewer: bytes of {reference} for one of the arm's.")
        if baseline in summary.index:
            lines.append(f"gap closed: of the {name} from {baseline} (0%) to {reference} (100%).")
    sources = "; ".join(dict.fromkeys(summary["energy_source"]))
    lines.append(f"Work of all clients and the server without evaluation; bytes and time measured, energy {sources}.")
    return lines


def render_summary(
    summary: pd.DataFrame,
    title: str,
    *,
    reference: str,
    baseline: str,
    metrics: pd.DataFrame = NO_METRICS,
    width: int | None = None,
) -> str:
    """The summary, and what each metric differs by, as plain text.

    By default it is as wide as the terminal, or `terminal.WIDTH` columns where there is none.
    """
    loss = compared_by(summary)
    others = [name for kind, name in LOSS_NAMES.items() if kind != loss]
    cells = summary_cells(summary).drop(columns=[*LEFT_OUT, *others])
    parts: list[RenderableType] = [_table(cells, title), Text()]
    parts += [Text(line) for line in notes(summary, reference=reference, baseline=baseline)]
    if metrics["difference"].notna().any():
        differences = metric_cells(metrics[metrics["difference"].notna()], ("difference",))
        in_two_lines = differences.map(lambda text: text.replace(" [", "\n["))
        parts += [Text(), _table(in_two_lines, ""), Text(), Text(INTERVALS_NOTE)]
    return as_text(*parts, width=width)


def _table(cells: pd.DataFrame, title: str) -> Table:
    table = narrow_table(title)
    for name in cells:
        # In two lines, else the heading would make the column wider than its numbers need.
        heading = str(name).replace("at equal", "at\nequal").replace("gap closed", "gap\nclosed")
        table.add_column(heading, justify="left" if name == "arm" else "right", overflow="fold", vertical="bottom")
    for row in cells.to_numpy().tolist():
        table.add_row(*map(Text, row))
    return table


def summary_markdown(
    summary: pd.DataFrame, title: str, *, reference: str, baseline: str, metrics: pd.DataFrame = NO_METRICS
) -> str:
    """The summary as a Markdown table with all columns of `summary_cells`, and one of all metrics."""
    said = [f"- {note}" for note in notes(summary, reference=reference, baseline=baseline)]
    lines = [f"# {title}", "", *_markdown(summary_cells(summary)), "", *said, ""]
    if len(metrics):
        lines += ["## Metrics", "", *_markdown(metric_cells(metrics)), "", f"- {INTERVALS_NOTE}", ""]
    return "\n".join(lines)


def _markdown(cells: pd.DataFrame) -> list[str]:
    def line(values: Iterable[object]) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"

    rule = line(["---"] + ["---:"] * (len(cells.columns) - 1))
    return [line(cells.columns), rule, *(line(row) for row in cells.to_numpy().tolist())]
