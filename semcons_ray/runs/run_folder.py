"""A run's folder: its files, and how a run that was stopped or killed is continued from them.

    config.yaml             every setting, with `auto` resolved and paths absolute
    environment.json        versions, machine, commits of hub models and data
    placement.json          workers, nodes and energy meters
    data.parquet            who holds which example
    canaries.parquet        made-up examples and their coins, if there are any
    data_report.json        how much of the data is not used, by reason
    code/                   modules of parts of one's own, as they were when the run began, if there are any
    state/config.yaml       the settings with which the run began, even if config.yaml is edited
    state/round_NNN.msgpack the commit of a round: if it is there, the round is done; if not, it is run (again)
    state/server_NNN        the server's state after a round; of the last two rounds
    state/client_NNN/       clients' states (see federation/store.py); own/ is their models', if those keep something
    state/judge/            what the judge of answers said
    state/TRACKER.json      the run of a tracker that goes on after a resume, and the last round that was sent to it
    ledger.parquet/, metrics.parquet/, rounds.parquet/    tables, with a part for each round, made of its commit
    consensus/round_NNN.parquet                       every answer to every prompt, and which was elected
    items/round_NNN.parquet                           what each test item gave for each client that was measured
    lm_eval/round_NNN.parquet                         scores of clients' models in tasks of lm-eval, if there are any
    adapters/client_NNN/    each client's last adapter, in PEFT's format
    audit/                  what semcons audit found: CSV files and verdict.txt
    report.html             the report
    tensorboard/            each round's numbers for TensorBoard
    run.log                 what all processes of the run logged

Every file but the last two is written under another name and then renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import pandas as pd
import pyarrow.parquet as pq

from semcons_ray.config import ExperimentConfig, dump_config, load_config
from semcons_ray.data.losses import Tally
from semcons_ray.errors import RunFolderError, writing
from semcons_ray.evaluation.harness import PREFIX, STDERR, TaskScore
from semcons_ray.metering.ledger import LedgerRow

Loss = Literal["nll", "bits_per_byte"]
"""Columns of `MetricsRow` with a loss on the reference answers; lower is better."""

LOSS_NAMES: Mapping[Loss, str] = {"nll": "test NLL", "bits_per_byte": "bits per byte"}


def comparable_loss(models: Iterable[str]) -> Loss:
    """The loss by which clients of these models, which tell how likely they find a text, may be averaged and ranked.

    Tokenizers cut a text into different tokens, so nats a token only compare clients of one model. Bits per byte of the
    text compare any models.
    """
    return "nll" if len(set(models)) <= 1 else "bits_per_byte"


class MetricsRow(msgspec.Struct, frozen=True, kw_only=True):
    """A client's model on the test set after a round: a row of metrics.parquet. Round 0 is the base model.

    Attributes:
        model: Name of the client's model.
        nll: Mean negative log-likelihood (nats a token) of the reference answers; NaN, as the next two, if the model
            does not tell it.
        perplexity: Exponential of `nll`.
        bits_per_byte: Negative log-likelihood in bits, divided by the bytes of the reference answers as UTF-8. Unlike
            nats a token, it compares models with different tokenizers.
        rouge_l: Mean ROUGE-L F-measure of the client's answers, 0 to 1; NaN if none was answered.
        similarity: Mean cosine of the client's answers to the references, by the server's embedding model; NaN if none
            was answered.
        train_loss: Mean loss (nats a token) over the round's fine-tuning; NaN if there was none.
        num_private: Private examples of the client.
        num_pseudo_labels: Pseudo-labels on which it trained in the round.
        others: Further metrics, each a column of its own name.
    """

    round: int
    client_id: int
    model: str
    nll: float
    perplexity: float
    bits_per_byte: float
    rouge_l: float
    similarity: float
    train_loss: float
    num_private: int
    num_pseudo_labels: int
    others: dict[str, float] = {}


def with_loss(rows: Iterable[MetricsRow]) -> list[MetricsRow]:
    """The rows of models that tell how likely they find a text."""
    return [row for row in rows if not math.isnan(row.nll)]


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """A round as a whole: a row of rounds.parquet.

    Attributes:
        round: The round; 0 is set-up and the evaluation of the base model.
        started_at: Start by the driver's clock, unix seconds.
        duration_seconds: Length of the round.
        num_participants: Clients asked.
        num_answered: Clients that answered.
        lost: Ids of the clients left out of the round, separated by commas; empty if none.
        failures: Reasons for which they were left out.
        num_labels: Prompts that gave a pseudo-label.
        mean_agreement: Mean over prompts; NaN if no consensus was formed.
        label_churn: Share of prompts whose pseudo-label changed since the round before; NaN if there was none before.
        distrusted: Ids of the clients whose votes count less, or nothing, by `algorithm.defence`, separated by commas;
            empty if none.
        virtual_seconds: When it ended in the virtual time of `federation.devices`, seconds since round 1 began; NaN
            without them.
    """

    round: int
    started_at: float
    duration_seconds: float
    num_participants: int
    num_answered: int
    lost: str
    failures: str
    num_labels: int
    mean_agreement: float
    label_churn: float
    distrusted: str = ""
    virtual_seconds: float = math.nan


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """All that a finished round adds to the run."""

    summary: RoundRow
    metrics: tuple[MetricsRow, ...]
    ledger: tuple[LedgerRow, ...]


def columns_of(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Types of the columns that every table has whose rows are of this class, by name; `MetricsRow.others` has further
    ones, of numbers."""
    fields = [field for field in msgspec.structs.fields(kind) if field.name != "others"]
    return {field.name: _DTYPES.get(field.type, "str") for field in fields}


_DTYPES = {int: "int64", float: "float64", str: "str"}

TABLES: Mapping[str, type[msgspec.Struct]] = {
    "ledger.parquet": LedgerRow,
    "rounds.parquet": RoundRow,
    "metrics.parquet": MetricsRow,
}
"""The classes of the rows of the tables that have a part for each round, in the order in which parts are written: a
reader finds all of a round of which there are metrics."""


SCORES = "lm_eval"
"""Folder of a run with the scores in tasks of lm-eval."""

BEGUN = "state/config.yaml"
"""File in a run's folder with the settings with which the run began."""

DECIDE_NO_NUMBER = ("name", "resources", "energy", "tracking", "failures")
"""Settings and sections that decide none of a run's numbers but seconds and joules. They may be changed before a
resume."""


def differences(begun: ExperimentConfig, now: ExperimentConfig) -> list[tuple[str, Any, Any]]:
    """The settings that decide a run's numbers and differ: their dotted keys, and both values.

    Args:
        begun: Settings with which the run began.
        now: Settings as they are now.
    """

    def compare(one: Mapping[str, Any], other: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any, Any]]:
        for key, value in other.items():
            if isinstance(value, dict) and isinstance(one[key], dict) and value.keys() == one[key].keys():
                yield from compare(one[key], value, f"{above}{key}.")
            elif value != one[key]:
                yield f"{above}{key}", one[key], value

    stored, wanted = (config.model_dump(mode="json", exclude=set(DECIDE_NO_NUMBER)) for config in (begun, now))
    if now.model.dtype == "auto":
        stored["model"]["dtype"] = "auto"  # a run that has begun stores the dtype to which auto was resolved
    if now.generation.engine == "auto":
        stored["generation"]["engine"] = "auto"  # likewise
    if now.model.max_length is None:
        stored["model"]["max_length"] = None  # likewise
    return list(compare(stored, wanted, ""))


class RunFolder:
    """Paths, commits and tables of one run.

    Args:
        path: An existing run folder.

    Raises:
        RunFolderError: `path` is not a run folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise RunFolderError(f"{path} is not a folder")
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{path} has no config.yaml, so it is no run folder; semcons run --out DIR makes one")
        self.path = path
        self.state = path / "state"
        self.data = path / "data.parquet"
        self.canaries = path / "canaries.parquet"
        self.data_report = path / "data_report.json"
        self.adapters = path / "adapters"
        self.log = path / "run.log"
        self.code = path / "code"

    @classmethod
    def create(cls, path: Path, config: ExperimentConfig) -> RunFolder:
        """Make a run folder with the settings in it; `path` must not exist, or be an empty folder.

        Raises:
            RunFolderError: There is something at `path` already, or it cannot be written.
        """
        with cls._making(path) as beside:
            (beside / BEGUN).parent.mkdir(parents=True)
            for name in ("config.yaml", BEGUN):
                (beside / name).write_text(dump_config(config), encoding="utf-8")
        return cls(path)

    def branch(self, path: Path, config: ExperimentConfig, next_state: bytes) -> RunFolder:
        """Copy a finished run to a new folder, where it goes on with other settings and from another state of the
        server; `path` must not exist, or be an empty folder.

        Raises:
            RunFolderError: There is something at `path` already, or it cannot be written.
        """
        last = self.stored_config().num_rounds
        with self._making(path) as beside:
            made_anew = (self.adapters.name, self.log.name, "lock", ".mark-*", "report.html", "tensorboard")
            shutil.copytree(self.path, beside, ignore=shutil.ignore_patterns(*made_anew))
            copied = RunFolder(beside)
            copied.write_config(config)
            copied._write(f"state/server_{last:03d}", next_state)
        return RunFolder(path)

    @classmethod
    @contextlib.contextmanager
    def _making(cls, path: Path) -> Iterator[Path]:
        """Where to make a run folder that is at `path`, whole, when the block ends."""
        cls.check_free(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as made:
                yield Path(made) / "run"
                (Path(made) / "run").rename(path)
        except OSError as error:
            raise RunFolderError(f"cannot write {path}: {error.strerror}; choose another --out") from error

    @staticmethod
    def check_free(path: Path) -> None:
        """Check that a run folder can be made at `path`.

        Raises:
            RunFolderError: There is something at `path` already.
        """
        if (path / BEGUN).is_file():
            raise RunFolderError(f"{path} holds a run: go on with semcons resume {path}, or choose another --out")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(f"{path} is not empty; choose another --out")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process; the lock ends with the block, or with the process if it is killed.

        Raises:
            RunFolderError: Another process has locked it.
        """
        with held(self.state / "lock", self.path):
            yield

    def is_in_use(self) -> bool:
        """Whether a process has locked the run, which it has as long as it works on it."""
        lock = self.state / "lock"
        if not lock.is_file():
            return False
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def count_visits(self, round: int) -> int:
        """Number of clients whose visit of a round is done; of the last rounds only, as older states are removed."""
        return sum(1 for _ in self.state.glob(f"client_*/round_{round:03d}.safetensors"))

    def is_finished(self, num_rounds: int) -> bool:
        """Whether nothing is left to do. Adapters are written last, and appear all at once."""
        return (self.state / f"round_{num_rounds:03d}.msgpack").is_file() and self.adapters.is_dir()

    @contextlib.contextmanager
    def writing_adapters(self) -> Iterator[Path]:
        """A folder for the adapters, which is renamed to `adapters` at the end of the block, when all are written."""
        beside = self.path.resolve() / ".adapters"
        shutil.rmtree(beside, ignore_errors=True)
        with writing(self.path):
            try:
                beside.mkdir()
                yield beside
                beside.rename(self.adapters)
            finally:
                shutil.rmtree(beside, ignore_errors=True)  # some of them, where the disk is full

    def drop_adapters(self) -> None:
        """Remove the adapters, if there are any, since rounds are going to be run after them."""
        shutil.rmtree(self.adapters, ignore_errors=True)

    def read_config(self) -> ExperimentConfig:
        """The settings in config.yaml, which may have been edited.

        Raises:
            ConfigError: See `load_config`.
        """
        return load_config(self.path / "config.yaml")

    def stored_config(self) -> ExperimentConfig:
        """The same, only to be shown: parts that they name need not be there any more.

        Raises:
            ConfigError: See `load_config`.
        """
        return load_config(self.path / "config.yaml", stored=True)

    def begun_with(self) -> ExperimentConfig:
        """The settings with which the run began; see `stored_config`.

        Raises:
            RunFolderError: No run has begun here.
        """
        if not (self.path / BEGUN).is_file():
            raise RunFolderError(
                f"{self.path} has no {BEGUN}, so no run has begun there that could go on; semcons run "
                f"{self.path / 'config.yaml'} --out DIR begins one"
            )
        return load_config(self.path / BEGUN, stored=True)

    def settings_to_resume(self, now: ExperimentConfig) -> ExperimentConfig:
        """The settings with which the run began, and those of `now` for the parts named in `DECIDE_NO_NUMBER`.

        Raises:
            RunFolderError: No run has begun here, or other settings were changed since; the message names them.
        """
        begun = self.begun_with()
        if changed := [f"{key} was changed from {one!r} to {other!r}" for key, one, other in differences(begun, now)]:
            finished = "the run is finished and " if self.is_finished(begun.num_rounds) else ""
            raise RunFolderError(
                f"{self.path}: {finished}{', '.join(changed)} since it began; set that back, or begin another run in a "
                f"new folder"
            )
        return begun.model_copy(update={name: getattr(now, name) for name in DECIDE_NO_NUMBER})

    def write_config(self, config: ExperimentConfig) -> None:
        """Write settings to config.yaml, and as those with which the run began."""
        for name in (BEGUN, "config.yaml"):
            self._write(name, dump_config(config).encode())

    def revisions(self) -> dict[str, str]:
        """The commits of hub models and data with which the run began, see `assembly.pin_revisions`; empty if it has
        not.

        Raises:
            RunFolderError: environment.json, which holds them, is damaged.
        """
        path = self.path / "environment.json"
        try:
            return dict(json.loads(path.read_bytes()).get("revisions", {})) if path.is_file() else {}
        except (ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{path} is damaged ({error!r}); start the run again in a new folder") from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self._write(name, (json.dumps(value, indent=2, default=str) + "\n").encode())

    def tallies(self) -> tuple[Tally, ...]:
        """How much of the data is not used and why; empty if it was not counted yet.

        Raises:
            RunFolderError: The file is damaged.
        """
        if not self.data_report.is_file():
            return ()
        try:
            return msgspec.json.decode(self.data_report.read_bytes(), type=tuple[Tally, ...])
        except msgspec.MsgspecError as error:
            raise RunFolderError(f"{self.data_report} is damaged ({error}); start the run again") from error

    def write_tallies(self, tallies: Sequence[Tally]) -> None:
        """Write data_report.json: how much of the data is not used and why."""
        self._write(self.data_report.name, msgspec.json.format(msgspec.json.encode(tallies), indent=2) + b"\n")

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Write a parquet file."""
        self._write(name, frame.to_parquet(index=False))

    def commit(self, commit: Commit, next_state: bytes) -> None:
        """Commit a round and add it to the tables, in a time that does not grow with the rounds before.

        Args:
            commit: The round, which follows on those that are committed.
            next_state: The server's state after it.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        round = commit.summary.round
        self._write(f"state/server_{round:03d}", next_state)
        self._write(f"state/round_{round:03d}.msgpack", msgspec.msgpack.encode(commit))
        (self.state / f"server_{round - 2:03d}").unlink(missing_ok=True)
        parts = {name: self._part(name, commit) for name in TABLES}
        columns = {name: self._known_columns(name) or [*part] for name, part in parts.items()}
        if all(set(part) <= set(columns[name]) for name, part in parts.items()):
            for name, part in parts.items():
                self._write(_place(name, round), _encode_part(name, part, columns[name]))
        else:  # a metric that no round had before
            self.write_tables(self.commits())

    def server_state(self, round: int) -> bytes:
        """The server's state after a committed round.

        Raises:
            RunFolderError: It is missing.
        """
        path = self.state / f"server_{round:03d}"
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunFolderError(
                f"cannot read {path}: {error.strerror}; start the run again in a new folder"
            ) from error

    def commits(self, first: int = 0) -> list[Commit]:
        """Commits of the rounds done, from the first one asked for on.

        Raises:
            RunFolderError: One is damaged.
        """
        commits: list[Commit] = []
        while (path := self.state / f"round_{first + len(commits):03d}.msgpack").is_file():
            try:
                commits.append(msgspec.msgpack.decode(path.read_bytes(), type=Commit))
            except msgspec.MsgspecError as error:
                raise RunFolderError(
                    f"{path} is damaged ({error}); delete it and all later rounds, and resume repeats them"
                ) from error
        return commits

    def write_tables(self, commits: Sequence[Commit]) -> None:
        """Gather the tables from the commits of all rounds done. Parts that are as they should be are left alone."""
        for name in TABLES:
            parts = [self._part(name, commit) for commit in commits]
            names = dict.fromkeys(str(column) for part in parts for column in part)
            columns = sorted(names, key=lambda column: column if column.startswith(PREFIX) else "")
            if (self.path / name).is_file():  # an earlier version kept a table in one file
                (self.path / name).unlink()
            for round, part in enumerate(parts):
                path, content = self.path / _place(name, round), _encode_part(name, part, columns)
                if not path.is_file() or path.read_bytes() != content:
                    self._write(_place(name, round), content)
            wanted = {self.path / _place(name, round) for round in range(len(parts))}
            for path in {*(self.path / name).glob("round_*.parquet")} - wanted:  # of a commit that was deleted
                path.unlink()

    def has_tables(self) -> bool:
        """Whether tables have a round in them."""
        last = self.path / [*TABLES][-1]
        return last.is_file() or any(last.glob("round_*.parquet"))

    def _part(self, name: str, commit: Commit) -> pd.DataFrame:
        """What a round adds to a table."""
        rows: Sequence[msgspec.Struct] = {
            "ledger.parquet": commit.ledger,
            "rounds.parquet": (commit.summary,),
            "metrics.parquet": commit.metrics,
        }[name]
        values = [msgspec.structs.asdict(row) for row in rows]
        others = [row.pop("others", {}) for row in values]
        part = pd.DataFrame(values, columns=[*columns_of(TABLES[name])])
        part = pd.concat([part, pd.DataFrame(others, index=part.index)], axis="columns")
        return part.join(self.scores(commit.summary.round), on="client_id") if name == "metrics.parquet" else part

    def _known_columns(self, name: str) -> list[str]:
        """The columns of a table so far; none if it has no round."""
        first = self.path / _place(name, 0)
        return list(pq.read_schema(first).names) if first.is_file() else []

    def add_scores(self, round: int, scores: Mapping[int, Sequence[TaskScore]]) -> None:
        """Add to what clients' models score in tasks of lm-eval after a round; tables are not written.

        Args:
            round: The round; 0 is the base model.
            scores: The scores by client. Older ones in the same tasks are replaced.
        """
        rows = [{"client_id": client, **msgspec.structs.asdict(one)} for client, each in scores.items() for one in each]
        if rows:
            name, key = f"{SCORES}/round_{round:03d}.parquet", ["client_id", "task", "metric"]
            before = [pd.read_parquet(self.path / name)] if (self.path / name).is_file() else []
            self.write_table(name, pd.concat([*before, pd.DataFrame(rows)]).drop_duplicates(key, keep="last"))

    def scores(self, round: int) -> pd.DataFrame:
        """What clients' models score in tasks of lm-eval after a round: columns of metrics.parquet, by client id."""
        path = self.path / f"{SCORES}/round_{round:03d}.parquet"
        if not path.is_file():
            return pd.DataFrame()
        scores = pd.read_parquet(path)
        scores["column"] = PREFIX + scores["task"] + "/" + scores["metric"]
        by_client = scores.pivot(index="client_id", columns="column", values=["value", "stderr"])
        wide: pd.DataFrame = by_client["value"].join(by_client["stderr"].add_suffix(STDERR))
        return wide.sort_index(axis="columns")

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_file(path, content)


def _place(name: str, round: int) -> str:
    """A round's part of a table. Readers put parts together in the order of their names."""
    return f"{name}/round_{round:06d}.parquet"


def _encode_part(name: str, part: pd.DataFrame, columns: Sequence[str]) -> bytes:
    """A part as a parquet file. All parts of a table have the same columns of the same types."""
    types = dict.fromkeys(columns, "float64") | columns_of(TABLES[name])
    return bytes(part.reindex(columns=list(columns)).astype(types).to_parquet(index=False))


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that a reader never sees half of it.

    Raises:
        StorageError: The disk is full, or cannot be written to.
    """
    beside = path.with_name(f".{path.name}")
    with writing(path.parent):
        try:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)  # half of a file, where the disk is full


@contextlib.contextmanager
def held(lock: Path, folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock while the block runs; it also ends with the process.

    Args:
        lock: File to lock; it is made if need be.
        folder: The folder that the lock protects, for errors.
        wait: Whether to wait until another process lets go of it.

    Raises:
        RunFolderError: Another process holds it and `wait` is not set, or the file system has no locks.
        StorageError: The lock file cannot be made.
    """
    with writing(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        try:
            _lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise RunFolderError(f"{folder} is in use by another process") from error
        except OSError as error:
            raise RunFolderError(f"cannot lock {lock}: {error.strerror}; let --out lie elsewhere") from error
        yield


def _lock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        time.sleep(0.1)  # `is_in_use` may have looked in, which takes no time
        fcntl.flock(file, how)
