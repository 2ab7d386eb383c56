"""Shows the progress of a run in the terminal, on stderr: a bar for the round, and a line for each that is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.run_folder import LOSS_NAMES, MetricsRow, RoundRow, comparable_loss


class Progress:
    """An `experiment.Observer` that shows progress in the terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)  # names may hold brackets
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        """Print what begins."""
        self._clear()
        self._console.print(f"{text} ...", style="dim")

    def planned(self, text: str) -> None:
        """Print the text unchanged: a file's name may look like markup."""
        self._console.print(text, soft_wrap=True, markup=False)

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        """Start the round's bar."""
        self._clear()
        title = f"round {round}/{num_rounds}" if round else "base model"
        self._task = self._bars.add_task(title, total=num_participants)

    def client_done(self, reply: Reply) -> None:
        """Advance the bar."""
        if self._task is not None:
            self._bars.advance(self._task)

    def round_ends(self, summary: RoundRow, metrics: Sequence[MetricsRow]) -> None:
        """Print the round's line."""
        self._clear()
        parts = [f"round {summary.round}" if summary.round else "base model"]
        if metrics:
            loss = comparable_loss(row.model for row in metrics)
            mean, clients = fmean(getattr(row, loss) for row in metrics), "client" if len(metrics) == 1 else "clients"
            parts.append(f"mean {LOSS_NAMES[loss]} {mean:.3f} of {len(metrics)} {clients}")
        labels = f"{summary.num_labels} pseudo-labels"
        if not math.isnan(summary.mean_agreement):
            parts.append(f"agreement {summary.mean_agreement:.2f}, {labels}")
        elif summary.num_labels:  # all of single answers, whose agreement is undefined
            parts.append(labels)
        if summary.lost:
            parts.append(f"left out: {summary.failures}")
        self._console.print("  ".join([*parts, f"({summary.duration_seconds:.0f} s)"]), soft_wrap=True)

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
