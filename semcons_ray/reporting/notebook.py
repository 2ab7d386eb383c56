"""Results as a notebook shows them: a compact table and a figure in one piece of HTML, which needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from semcons_ray.reporting.figures import quality_figure
from semcons_ray.reporting.html import headlines, page_environment
from semcons_ray.reporting.summary import LEFT_OUT, compared_by, notes, summary_cells
from semcons_ray.reporting.sweep import SweepResult, front_figure, trial_cells
from semcons_ray.reporting.tables import Run, describe_progress, result_cells
from semcons_ray.runs.run_folder import LOSS_NAMES

WORDS = frozenset({"client", "model", "arm", "on the front of"})
"""Headings of columns that hold words, not numbers."""


def run_cell(run: Run) -> str:
    """A run: its headline numbers, its clients, and their loss by round."""
    figure = quality_figure(run, run.loss)
    said = [f"{row['label']}: {row['value']} ({row['note']})" for row in headlines(run)]
    return _cell(describe_progress(run), result_cells(run), said, figure.svg if figure else "")


def comparison_cell(summary: pd.DataFrame, title: str, figure: Path, *, reference: str, baseline: str) -> str:
    """A comparison: its arms, and the figure in a file; see `summarize`."""
    others = [name for kind, name in LOSS_NAMES.items() if kind != compared_by(summary)]
    cells = summary_cells(summary).drop(columns=[*LEFT_OUT, *others])
    picture = base64.b64encode(figure.read_bytes()).decode()
    drawing = f'<img src="data:image/svg+xml;base64,{picture}" alt="quality against cost">'
    return _cell(title, cells, notes(summary, reference=reference, baseline=baseline), drawing)


def sweep_cell(result: SweepResult) -> str:
    """A sweep: its trials, and the front of its metric against bytes."""
    drawing = front_figure(result).svg if len(result.finished) else ""
    return _cell(result.name, trial_cells(result), [], drawing)


def table_cell(title: str, table: pd.DataFrame, said: Sequence[str] = ()) -> str:
    """A table of numbers with its index."""
    cells = table.rename_axis("").reset_index()
    return _cell(title, cells.map(lambda value: f"{value:,.0f}" if isinstance(value, float) else str(value)), said, "")


def _cell(title: str, cells: pd.DataFrame, said: Sequence[str], drawing: str) -> str:
    """The HTML; `drawing` is an element, and everything else is text."""
    template = page_environment().get_template("cell.html.j2")
    headings = [str(heading) for heading in cells]
    return template.render(
        title=title,
        headings=headings,
        is_text=[heading in WORDS or not heading for heading in headings],
        rows=cells.to_numpy().tolist(),
        said=said,
        drawing=Markup(drawing),
    )
