"""Prints tables on a terminal whole: where it is too narrow, texts and headings are broken, and no number is cut."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

LONGEST_WORD = 24
"""Words of texts and headings that have more characters than this may be broken."""
BETWEEN = 3
"""Characters between two columns, at most."""


WIDTH = 120
"""Characters in a line where there is no terminal."""


def narrow_table(title: str = "") -> Table:
    """A table to which columns are to be added, with as little between and around them as can be read."""
    return Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
                 pad_edge=False, padding=(0, 1), collapse_padding=True)  # fmt: skip


def whole_table(headings: Sequence[str], rows: Iterable[Sequence[str]], unbroken: Sequence[str], width: int) -> str:
    """A table of texts, as wide as the terminal.

    Args:
        headings: One for each column.
        rows: Cells, in the order of the headings.
        unbroken: Headings of the columns whose cells are in one line.
        width: Characters in a line where there is no terminal.
    """
    table = Table(show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in unbroken)
    for row in rows:
        table.add_row(*row)
    stream, width = io.StringIO(), shutil.get_terminal_size((width, 24)).columns
    console = Console(file=stream, highlight=False, markup=False, soft_wrap=True, width=width, force_jupyter=False)
    print_whole(console, table)
    return stream.getvalue().rstrip("\n")


def as_text(*parts: RenderableType, width: int | None = None) -> str:
    """What `print_whole` prints, as plain text.

    Args:
        parts: What is printed.
        width: In characters; None: the terminal's, or `WIDTH` where there is none.
    """
    stream, width = io.StringIO(), width or shutil.get_terminal_size((WIDTH, 24)).columns
    print_whole(Console(file=stream, width=width, color_system=None, force_jupyter=False), *parts)
    return stream.getvalue()


def print_whole(console: Console, *parts: RenderableType) -> None:
    """Print tables, whose right-justified columns hold numbers, and what stands between and below them.

    If even broken texts do not fit the console, lines are longer than it, which a terminal shows in several. rich by
    itself would leave out the last columns.
    """
    width = console.width
    tables = [part for part in parts if isinstance(part, Table)]
    console.width = max([width, *(sum(map(_least_width, table.columns)) + _between(table) for table in tables)])
    for table in tables:
        _set_widths(table, console.width)
    try:
        console.print(Group(*parts))
    finally:
        console.width = width


def _set_widths(table: Table, width: int) -> None:
    """Give the columns that want little all of it, and the others equal parts of what is left."""
    least = [_least_width(column) for column in table.columns]
    spare = width - sum(least) - _between(table)
    wanted = [_width(column) - taken for column, taken in zip(table.columns, least, strict=True)]
    in_turn = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for position, index in enumerate(in_turn):
        given = max(min(wanted[index], spare // (len(in_turn) - position)), 0)
        spare -= given
        table.columns[index].width = least[index] + given


def _between(table: Table) -> int:
    return BETWEEN * len(table.columns)


def _width(column: Column) -> int:
    """Width of a column that breaks nothing."""
    cells = [str(column.header), *map(str, column.cells)]
    return max(cell_len(line) for cell in cells for line in cell.split("\n"))


def _least_width(column: Column) -> int:
    """Width of a column that breaks no number, and no word that is not long."""
    cells, words = [line for cell in column.cells for line in str(cell).split("\n")], str(column.header).split()
    if column.justify != "right":
        cells, words = [], [*words, *(word for cell in cells for word in cell.split())]
    return max([*map(cell_len, cells), *(min(cell_len(word), LONGEST_WORD) for word in words)], default=1)
