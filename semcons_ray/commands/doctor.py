"""`semcons doctor`: prints what this machine has for an experiment, and what to do about what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semcons_ray.api.doctor import Check

STYLES = {"ok": "green", "missing": "red", "warning": "yellow"}


def exit_code(checks: Sequence[Check]) -> int:
    """0, or 1 if something essential is missing."""
    return int(any(check.essential and check.status == "missing" for check in checks))


def render(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print the checks as a table; on stdout unless given another console."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("Check", "Status", "Found", "What to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        # Text, not markup: advice holds brackets, as in semcons_ray[packaged].
        table.add_row(
            Text(check.name), Text(check.status, style=STYLES[check.status]), Text(check.found), Text(check.advice)
        )
    (console or Console()).print(table)
