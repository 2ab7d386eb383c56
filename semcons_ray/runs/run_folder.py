"""A run's folder: what is written in it, when, and how a killed run finds its place again.

    config.yaml             every setting, with `auto` resolved and paths absolute
    environment.json        versions, machine, commits of hub models and data
    placement.json          workers, nodes and energy meters
    data.parquet            who holds which example; data_report.json: what of the data is not used, by reason
    state/config.yaml       the settings that the run began with, whatever becomes of the others
    state/round_NNN.msgpack the commit of a round: there, and the round is done; not there, and it is run (again)
    state/server_NNN        what the server takes from a round into the next; of the last two rounds
    state/client_NNN/       clients' states (see federation/store.py)
    ledger.parquet, metrics.parquet, rounds.parquet   tables, gathered from the commits
    consensus/round_NNN.parquet                       every answer to every prompt, and what was chosen
    adapters/client_NNN/    in PEFT's format
    report.html

Every file is written beside and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import pandas as pd

from semcons_ray.config import ExperimentConfig, dump_config, load_config
from semcons_ray.data.losses import Tally
from semcons_ray.errors import RunFolderError, writing
from semcons_ray.metering.ledger import LedgerRow

Loss = Literal["nll", "bits_per_byte"]
"""Columns of `MetricsRow` that say how likely a model finds the reference answers; lower is better."""

LOSS_NAMES: Mapping[Loss, str] = {"nll": "test NLL", "bits_per_byte": "bits per byte"}


def comparable_loss(models: Iterable[str]) -> Loss:
    """The loss that may be averaged over clients of these models, and rank them.

    Tokens are what a model's tokenizer makes of a text, so nats a token are a measure of one model alone; bits per byte
    of the text compare any.
    """
    return "nll" if len(set(models)) <= 1 else "bits_per_byte"


class MetricsRow(msgspec.Struct, frozen=True, kw_only=True):
    """A client on the test set after a round; a row of metrics.parquet. Round 0 is the base model.

    Attributes:
        nll: Mean negative log-likelihood (nats) of a token of the reference answers.
        perplexity: Its exponential.
        bits_per_byte: The same likelihood in bits, over the bytes of the reference answers as UTF-8: unlike nats a
            token, it compares models with different tokenizers.
        rouge_l: Mean ROUGE-L F of the client's answers.
        similarity: Mean cosine of the client's answers to the references, by the server's embedding model.
        train_loss: Mean loss (nats a token) over the round's fine-tuning.
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


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """A round as a whole; a row of rounds.parquet.

    Attributes:
        lost: Clients left out of the round; empty if none.
        failures: Why.
        num_labels: Prompts that gave a pseudo-label.
        mean_agreement: Over prompts; NaN where no consensus was formed.
        label_churn: Share of prompts whose pseudo-label changed since the round before; NaN where there was none.
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


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """All that a finished round adds to the run."""

    summary: RoundRow
    metrics: tuple[MetricsRow, ...]
    ledger: tuple[LedgerRow, ...]


BEGUN = "state/config.yaml"
"""Where a run's folder keeps the settings that it began with."""

DECIDE_NO_NUMBER = ("name", "resources", "energy", "failures")
"""Settings and sections that decide none of a run's numbers but seconds and joules: they may be changed on the way."""


def differences(begun: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """What was changed of the settings that decide a run's numbers, in words."""

    def compare(one: Mapping[str, Any], other: Mapping[str, Any], above: str) -> Iterator[str]:
        for key, value in other.items():
            if isinstance(value, dict) and isinstance(one[key], dict) and value.keys() == one[key].keys():
                yield from compare(one[key], value, f"{above}{key}.")
            elif value != one[key]:
                yield f"{above}{key} was changed from {one[key]!r} to {value!r}"

    stored, wanted = (config.model_dump(mode="json", exclude=set(DECIDE_NO_NUMBER)) for config in (begun, now))
    if now.model.dtype == "auto":
        stored["model"]["dtype"] = "auto"  # a run that has begun holds what it came to
    return list(compare(stored, wanted, ""))


class RunFolder:
    """Paths, commits and tables of one run.

    Args:
        path: An existing run folder.

    Raises:
        RunFolderError: It is not one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise RunFolderError(f"{path} is not a folder")
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{path} has no config.yaml, so it is no run folder; semcons run --out DIR makes one")
        self.path = path
        self.state = path / "state"
        self.data = path / "data.parquet"
        self.data_report = path / "data_report.json"
        self.adapters = path / "adapters"

    @classmethod
    def create(cls, path: Path, config: ExperimentConfig) -> RunFolder:
        """Make a run folder that holds the config; `path` must be free or an empty folder.

        Raises:
            RunFolderError: It holds something already, or cannot be written.
        """
        if (path / BEGUN).is_file():
            raise RunFolderError(f"{path} holds a run: go on with semcons resume {path}, or choose another --out")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(f"{path} is not empty; choose another --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as made:
                beside = Path(made) / "run"
                (beside / BEGUN).parent.mkdir(parents=True)
                for name in ("config.yaml", BEGUN):
                    (beside / name).write_text(dump_config(config), encoding="utf-8")
                beside.rename(path)
        except OSError as error:
            raise RunFolderError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a killed process lets go of it.

        Raises:
            RunFolderError: Another process is at it.
        """
        with held(self.state / "lock", self.path):
            yield

    def is_finished(self, num_rounds: int) -> bool:
        """Whether nothing is left to do: adapters come last, and all at once."""
        return (self.state / f"round_{num_rounds:03d}.msgpack").is_file() and self.adapters.is_dir()

    @contextlib.contextmanager
    def writing_adapters(self) -> Iterator[Path]:
        """A folder that becomes `adapters` when all are written."""
        beside = self.path.resolve() / ".adapters"
        shutil.rmtree(beside, ignore_errors=True)
        with writing(self.path):
            beside.mkdir()
            yield beside
            beside.rename(self.adapters)

    def drop_adapters(self) -> None:
        """Remove adapters of rounds that are to be repeated."""
        shutil.rmtree(self.adapters, ignore_errors=True)

    def read_config(self) -> ExperimentConfig:
        """The run's settings, as they stand in config.yaml."""
        return load_config(self.path / "config.yaml")

    def begun_with(self) -> ExperimentConfig:
        """The settings that the run began with.

        Raises:
            RunFolderError: No run has begun here.
        """
        if not (self.path / BEGUN).is_file():
            raise RunFolderError(
                f"{self.path} has no {BEGUN}, so no run has begun there that could go on; semcons run "
                f"{self.path / 'config.yaml'} --out DIR begins one"
            )
        return load_config(self.path / BEGUN)

    def settings_to_resume(self, now: ExperimentConfig) -> ExperimentConfig:
        """The settings that the run began with, but for those of `now` that decide no number.

        Raises:
            RunFolderError: No run has begun here, or others were changed since; names them.
        """
        begun = self.begun_with()
        if changed := differences(begun, now):
            finished = "the run is finished and " if self.is_finished(begun.num_rounds) else ""
            raise RunFolderError(
                f"{self.path}: {finished}{', '.join(changed)} since it began; set that back, or begin another run in a "
                f"new folder"
            )
        return begun.model_copy(update={name: getattr(now, name) for name in DECIDE_NO_NUMBER})

    def write_config(self, config: ExperimentConfig) -> None:
        """Replace the settings, also those that the run began with, by resolved ones."""
        for name in (BEGUN, "config.yaml"):
            self._write(name, dump_config(config).encode())

    def revisions(self) -> dict[str, str]:
        """Hub models and data, by their names in the settings, at the commits that the run began with.

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
        """What of the data is not used; nothing where a run began before it was counted.

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
        """Write what of the data is not used."""
        self._write(self.data_report.name, msgspec.json.format(msgspec.json.encode(tallies), indent=2) + b"\n")

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Write a parquet file."""
        self._write(name, frame.to_parquet(index=False))

    def commit(self, commits: Sequence[Commit], next_state: bytes) -> None:
        """Make the last of `commits` done, with what the server takes on, and bring the tables up to date."""
        round = len(commits) - 1
        self._write(f"state/server_{round:03d}", next_state)
        self._write(f"state/round_{round:03d}.msgpack", msgspec.msgpack.encode(commits[-1]))
        (self.state / f"server_{round - 2:03d}").unlink(missing_ok=True)
        self.write_tables(commits)

    def server_state(self, round: int) -> bytes:
        """What the server takes from a committed round into the next.

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

    def commits(self) -> list[Commit]:
        """Commits of the rounds done, from 0 on.

        Raises:
            RunFolderError: One is damaged.
        """
        commits: list[Commit] = []
        while (path := self.state / f"round_{len(commits):03d}.msgpack").is_file():
            try:
                commits.append(msgspec.msgpack.decode(path.read_bytes(), type=Commit))
            except msgspec.MsgspecError as error:
                raise RunFolderError(
                    f"{path} is damaged ({error}); delete it and all later rounds, and resume repeats them"
                ) from error
        return commits

    def write_tables(self, commits: Sequence[Commit]) -> None:
        """Gather the tables from the commits."""
        tables: dict[str, tuple[type[msgspec.Struct], list[msgspec.Struct]]] = {
            "rounds.parquet": (RoundRow, [commit.summary for commit in commits]),
            "metrics.parquet": (MetricsRow, [row for commit in commits for row in commit.metrics]),
            "ledger.parquet": (LedgerRow, [row for commit in commits for row in commit.ledger]),
        }
        for name, (kind, rows) in tables.items():
            columns = [field.name for field in msgspec.structs.fields(kind)]
            self.write_table(name, pd.DataFrame([msgspec.structs.asdict(row) for row in rows], columns=columns))

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_file(path, content)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file beside, and rename it.

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
    """Hold a lock, a file, on a folder; it ends with this process.

    Raises:
        RunFolderError: Another process holds it, and this one does not `wait`; or its file system knows no locks.
    """
    with writing(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise RunFolderError(f"{folder} is in use by another process") from error
        except OSError as error:
            raise RunFolderError(f"cannot lock {lock}: {error.strerror}; let --out lie elsewhere") from error
        yield
