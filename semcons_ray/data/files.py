"""Reads rows from files: JSON, JSON lines, CSV, TSV and Parquet, all but the last also compressed.

A cell has the same text in every kind of file. A number or truth value is written as in a CSV file (3, 3.0, True);
a null or NaN is empty. No type is guessed, which would turn 007 into 7, NA into nothing, and 3 beside a null into 3.0.

Rows are read one by one, so that a large file takes little memory; only a .json file is held as a whole.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, cast

import msgspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from semcons_ray.errors import DataError, first_line

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")

UNREADABLE = (OSError, UnicodeDecodeError, RecursionError, pa.ArrowException)
"""What reading raises where a file is missing, damaged, cut off, or not what its name says."""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        file: The file's name, for messages.
        unit: What `number` counts: "line", "item" or "row".
        number: Where it stands in the file, from 1.
        cells: Values by column.
    """

    file: str
    unit: str
    number: int
    cells: Mapping[str, Any]

    @property
    def where(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        name: The file's name, for messages.
        columns: Names of its columns; of JSON, those of the first row.
        rows: The rows; they can be read once.
        owner: The client that they belong to if each client has a file; "" if not.
    """

    name: str
    columns: Sequence[str]
    rows: Iterator[Row]
    owner: str = ""


def kind_of(file: str) -> str | None:
    """The kind of a file by its name, such as ".jsonl" for `x.jsonl.gz`; None if no such file is read here."""
    path = PurePath(file.lower())
    kind = PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return kind if kind in KINDS and (kind, path.suffix) not in [(".parquet", end) for end in COMPRESSED] else None


def read_table(path: Path, wanted: Collection[str], *, name: str | None = None) -> Table:
    """Open a file; its rows are read later, as they are asked for, and raise the same errors.

    Args:
        path: The file, UTF-8; or, of Parquet, a folder with the parts of one table.
        wanted: Names of the columns that may be used: each may be there only once, and cells of others may be left out.
        name: The file's name as the user knows it, which says its kind; None: that of `path`.

    Raises:
        DataError: It is of no kind that is read here, cannot be read, is malformed, or has a column twice.
    """
    name = name or str(path)
    kind = kind_of(name)
    if kind is None:
        raise DataError(f"{name} is not a {', '.join(KINDS)} file")
    rows = _guarded(name, _READERS[kind](path, name, wanted))
    first = next(rows, None)
    if first is None:
        return Table(name, (), iter(()))
    return Table(name, list(first.cells), itertools.chain([first], rows))


def _guarded(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except UNREADABLE as error:
        raise DataError(f"cannot read {name}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _open(path: Path, name: str) -> BinaryIO:
    # Arrow's streams say so where a compressed file is cut off; zstandard's take it for the end.
    compression = {".gz": "gzip", ".zst": "zstd"}.get(PurePath(name.lower()).suffix)
    return cast(BinaryIO, pa.input_stream(str(path), compression=compression) if compression else path.open("rb"))


def _jsonl_rows(path: Path, name: str, _: Collection[str]) -> Iterator[Row]:
    # Only a line feed ends a line: U+2028, too, may stand in a string.
    with io.TextIOWrapper(_open(path, name), encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(name, "line", number, line)


def _json_rows(path: Path, name: str, _: Collection[str]) -> Iterator[Row]:
    """Rows of an array; of a file that does not begin with one, those of JSON lines, as many of this name are."""
    with _open(path, name) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8).strip()
    if not content.startswith(b"["):
        yield from _jsonl_rows(path, name, _)
        return
    try:
        items = msgspec.json.decode(content, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise DataError(f"{name} is not JSON: {error}") from error
    del content
    for number, item in enumerate(items, start=1):
        yield _json_row(name, "item", number, bytes(item).decode())


def _json_row(name: str, unit: str, number: int, text: str) -> Row:
    row = Row(name, unit, number, {})
    try:
        cells = json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        reason = getattr(error, "msg", None) or first_line(error)  # msg: without a line number of its own
        raise DataError(f"{row.where} is not JSON: {reason}") from error
    if not isinstance(cells, dict):
        raise DataError(f"{row.where} is a {type(cells).__name__}, not an object with columns")
    return row._replace(cells=cells)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may come twice."""
    cells = dict(pairs)
    if len(cells) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return cells


def _csv_rows(path: Path, name: str, wanted: Collection[str], *, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the module's own, 128 KiB, is less than a long document
    began = 1  # the line of the record being read, which quoted line ends make several
    header: list[str] = []
    try:
        with io.TextIOWrapper(_open(path, name), encoding="utf-8-sig", newline="") as file:
            records = csv.reader(file, strict=True, delimiter=delimiter)
            for record in records:
                row, began = Row(name, "line", began, {}), records.line_num + 1
                if len(record) <= 1 and not "".join(record).strip():
                    continue
                if not header:
                    header = record
                    _check_once(name, header, wanted)
                    continue
                if len(record) != len(header):
                    what = "comma" if delimiter == "," else "tab"
                    raise DataError(
                        f"{row.where} has {len(record)} fields, and the header {len(header)}; a text that holds a "
                        f"{what} needs quotes around it, and no line may end in a {what} of its own"
                    )
                yield row._replace(cells=dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name}, line {began} is not CSV: {first_line(error)}") from error
    if not header:
        raise DataError(f"cannot read {name}: it is empty")


def _parquet_rows(path: Path, name: str, wanted: Collection[str]) -> Iterator[Row]:
    if path.is_file():
        _check_once(name, pq.read_schema(path).names, wanted)
    data = ds.dataset(path, format="parquet", partitioning="hive")
    others = dict.fromkeys(data.schema.names)
    number = 0
    for batch in data.to_batches(columns=[column for column in others if column in wanted], batch_readahead=1):
        # NumPy keeps a float32 what it is, whose text is 0.1 where a double's next to it is 0.10000000149011612.
        columns = [
            column.to_numpy(zero_copy_only=False) if pa.types.is_floating(column.type) else column.to_pylist()
            for column in batch.columns
        ]
        for cells in zip(*columns, strict=True):
            number += 1
            yield Row(name, "row", number, others | dict(zip(batch.column_names, cells, strict=True)))


def _check_once(name: str, columns: Sequence[str], wanted: Collection[str]) -> None:
    for column, count in Counter(columns).items():
        if count > 1 and column in wanted:
            raise DataError(f"{name} has {count} columns named {column}; rename all but one")


_READERS: dict[str, Callable[[Path, str, Collection[str]], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
