"""Shows a run that goes on in another process, read from its folder alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from semcons_ray.reporting.progress import about, describe_round, round_seconds, time_left
from semcons_ray.runs.run_folder import Commit, RunFolder

EVERY_SECONDS = 1.0


def watch(path: Path) -> bool:
    """Print each round that is or will be committed, and on a terminal what is going on, until the run ends.

    Returns:
        Whether the run is finished; else it has stopped before.

    Raises:
        UserError: It is no run folder, or one that is damaged.
    """
    folder = RunFolder(path)
    num_rounds = folder.stored_config().num_rounds
    console = Console(highlight=False, markup=False)
    commits: list[Commit] = []
    with console.status("") as status:
        goes_on = True
        while goes_on:
            goes_on = folder.is_in_use()  # asked first, so that what is written last is shown
            for commit in folder.commits(first=len(commits)):
                commits.append(commit)
                left = time_left(round_seconds(commits), num_rounds - commit.summary.round)
                console.print(describe_round(commit, left), soft_wrap=True)
            if goes_on:
                status.update(_state(folder, commits, num_rounds))
                time.sleep(EVERY_SECONDS)
    if folder.is_finished(num_rounds):
        console.print(f"finished; semcons report {path} writes its report", soft_wrap=True)
        return True
    console.print(f"not finished, and no process runs it; semcons resume {path} goes on with it", soft_wrap=True)
    return False


def _state(folder: RunFolder, commits: Sequence[Commit], num_rounds: int) -> str:
    """What is going on now."""
    round = len(commits)
    if round == 0:
        return "setting up, and measuring the base model"
    if round > num_rounds:
        return "writing adapters"
    last = commits[-1].summary
    elapsed = max(time.time() - last.started_at - last.duration_seconds, 0.0)
    visits = folder.count_visits(round)
    left = about(time_left(round_seconds(commits), num_rounds - round + 1, elapsed))
    answered = f"{visits} client{'' if visits == 1 else 's'} done"
    return ", ".join(filter(None, [f"round {round}/{num_rounds}: {answered}", f"{elapsed:.0f} s", left]))
