"""The summary of a comparison as text: a table for the terminal, and one in Markdown."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterable
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from semcons_ray.metering.units import format_quantity
from semcons_ray.reporting.comparison import LOSS_COLUMNS
from semcons_ray.reporting.tables import format_number, format_seconds
from semcons_ray.runs.run_folder import LOSS_NAMES, Loss

WIDTH = 120
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
            }
        )
    return pd.DataFrame(rows)


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
    summary: pd.DataFrame, title: str, *, reference: str, baseline: str, width: int | None = None
) -> str:
    """The summary as plain text; by default as wide as the terminal, or `WIDTH` columns where there is none."""
    loss = compared_by(summary)
    others = [name for kind, name in LOSS_NAMES.items() if kind != loss]
    cells = summary_cells(summary).drop(columns=[*LEFT_OUT, *others])
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
                  padding=(0, 1), collapse_padding=True)  # fmt: skip
    for name in cells:
        # In two lines, else the heading would make the column wider than its numbers need.
        heading = str(name).replace("at equal", "at\nequal").replace("gap closed", "gap\nclosed")
        table.add_column(heading, justify="left" if name == "arm" else "right", overflow="fold", vertical="bottom")
    for row in cells.to_numpy().tolist():
        table.add_row(*map(Text, row))
    stream = io.StringIO()
    width = width or shutil.get_terminal_size((WIDTH, 24)).columns
    lines = [Text(line) for line in notes(summary, reference=reference, baseline=baseline)]
    Console(file=stream, width=width, color_system=None).print(Group(table, Text(), *lines))
    return stream.getvalue()


def summary_markdown(summary: pd.DataFrame, title: str, *, reference: str, baseline: str) -> str:
    """The summary as a Markdown table with all columns of `summary_cells`."""
    cells = summary_cells(summary)

    def line(values: Iterable[object]) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"

    rows = [line(row) for row in cells.to_numpy().tolist()]
    rule = line(["---"] + ["---:"] * (len(cells.columns) - 1))
    said = [f"- {note}" for note in notes(summary, reference=reference, baseline=baseline)]
    return "\n".join([f"# {title}", "", line(cells.columns), rule, *rows, "", *said, ""])
