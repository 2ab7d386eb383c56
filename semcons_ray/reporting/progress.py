"""Shows the progress of a run in the terminal, on stderr: a bar for the round, and a line for each that is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.run_folder import LOSS_NAMES, Commit, comparable_loss, with_loss


class Progress(Observer):
    """Shows progress in the terminal."""

    name = "progress"

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)  # names may hold brackets
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, _Note(self._note), console=self._console, transient=True)
        self._task: TaskID | None = None
        self._durations: list[float] = []
        self._left = 0
        self._tokens = 0

    def stage(self, text: str) -> None:
        """Print what begins."""
        self._clear()
        self._console.print(f"{text} ...", style="dim")

    def planned(self, text: str) -> None:
        """Print the text unchanged: a file's name may look like markup."""
        self._console.print(text, soft_wrap=True, markup=False)

    def begins(self, commits: Sequence[Commit]) -> None:
        """Take note of how long earlier rounds took."""
        self._durations = round_seconds(commits)

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        """Start the round's bar."""
        self._clear()
        self._left, self._tokens = num_rounds - round + 1, 0
        self._bars.start()
        title = f"round {round}/{num_rounds}" if round else "base model"
        self._task = self._bars.add_task(title, total=num_participants)

    def client_done(self, reply: Reply) -> None:
        """Advance the bar."""
        self._tokens += sum(row.tokens for row in reply.rows)
        if self._task is not None:
            self._bars.advance(self._task)

    def round_ends(self, commit: Commit) -> None:
        """Print the round's line."""
        self._clear()
        self._durations += round_seconds([commit])
        left = time_left(self._durations, self._left - 1)
        self._console.print(describe_round(commit, left), soft_wrap=True)

    def ends(self, *, finished: bool) -> None:
        """Remove the bar."""
        if self._bars.live.is_started:  # else rich would print an empty line before an error's
            self._bars.stop()

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _note(self, task: Task) -> str:
        """What is said beside the bar: tokens a second in this round, and the time left for the run."""
        elapsed, done = task.elapsed or 0.0, task.completed
        parts = [describe_rate(self._tokens, elapsed)] if self._tokens and elapsed else []
        durations = self._durations
        if not durations and done and self._left and task.total:
            durations = [elapsed * task.total / done]  # of the first round, as far as it goes
        parts.append(about(time_left(durations, self._left, elapsed)))
        return ", ".join(filter(None, parts))


class _Note(ProgressColumn):
    """Text that is asked for whenever the bar is drawn."""

    def __init__(self, note: Callable[[Task], str]) -> None:
        super().__init__()
        self._note = note

    def render(self, task: Task) -> Text:
        """The text as it is now."""
        return Text(self._note(task), style="dim")


def describe_round(commit: Commit, left: float = math.nan) -> str:
    """A committed round in one line; `left` is the run's time left in seconds, NaN if it is not known."""
    summary, metrics = commit.summary, commit.metrics
    parts = [f"round {summary.round}" if summary.round else "base model"]
    told = with_loss(metrics)
    if told:
        loss = comparable_loss(row.model for row in told)
        mean, clients = fmean(getattr(row, loss) for row in told), "client" if len(told) == 1 else "clients"
        parts.append(f"mean {LOSS_NAMES[loss]} {mean:.3f} of {len(told)} {clients}")
    if without := len(metrics) - len(told):
        rouge = [row.rouge_l for row in metrics if not math.isnan(row.rouge_l)]
        scored = f", mean ROUGE-L of {len(rouge)} {fmean(rouge):.3f}" if rouge else ""
        parts.append(f"no likelihood from {without}{scored}")
    labels = f"{summary.num_labels} pseudo-labels"
    if not math.isnan(summary.mean_agreement):
        parts.append(f"agreement {summary.mean_agreement:.2f}, {labels}")
    elif summary.num_labels:  # all of single answers, whose agreement is undefined
        parts.append(labels)
    if summary.lost:
        parts.append(f"left out: {summary.failures}")
    if summary.distrusted:
        parts.append(f"distrusted by the defence: clients {summary.distrusted}")
    seconds, tokens = summary.duration_seconds, sum(row.tokens for row in commit.ledger)
    # Round 0 is mostly loading.
    rate = describe_rate(tokens, seconds) if tokens and summary.round else ""
    times = ", ".join(filter(None, [f"{seconds:.0f} s", rate, about(left)]))
    return "  ".join([*parts, f"({times})"])


def describe_rate(tokens: int, seconds: float) -> str:
    """Tokens a second, of all workers."""
    return f"{tokens / max(seconds, 1e-3):,.0f} tokens/s"


def round_seconds(commits: Sequence[Commit]) -> list[float]:
    """Seconds of each round but 0, which is set-up."""
    return [commit.summary.duration_seconds for commit in commits if commit.summary.round]


def time_left(durations: Sequence[float], rounds_left: int, elapsed: float = 0.0) -> float:
    """Seconds that a run has left if its rounds take as long as those before; NaN if it cannot be told.

    Args:
        durations: Seconds of rounds that are done.
        rounds_left: Number of rounds that are not, with the one in progress.
        elapsed: Seconds since that one began.
    """
    if not durations or rounds_left < 1:
        return math.nan
    each = fmean(durations)
    return (rounds_left - 1) * each + max(each - elapsed, 0.0)


def about(seconds: float) -> str:
    """An estimate of the time left, as rough as it is; empty for NaN."""
    if math.isnan(seconds):
        return ""
    if seconds < 90:
        return f"about {max(math.ceil(seconds / 5) * 5, 5)} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h left"
