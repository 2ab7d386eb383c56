"""What a run's folder holds of its settings, and what may be changed on the way."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig, dump_config, validate_config
from semcons_ray.errors import RunFolderError, StorageError
from semcons_ray.evaluation.harness import TaskScore
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.reporting.tables import read_ledger, read_metrics, read_rounds
from semcons_ray.runs import run_folder
from semcons_ray.runs.run_folder import TABLES, Commit, MetricsRow, RoundRow, RunFolder, held, write_file

CONFIG = validate_config({"num_rounds": 2, "clients": {"num_clients": 3}}, where="test")


def changed(**sections: Any) -> ExperimentConfig:
    values = CONFIG.model_dump()
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return validate_config(values, where="test")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


def test_a_new_folder_goes_on_with_what_it_began_with(folder: RunFolder) -> None:
    assert folder.settings_to_resume(folder.read_config()) == CONFIG


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"num_rounds": 3}, "num_rounds was changed from 2 to 3 since it began"),
        ({"seed": 1}, "seed was changed from 0 to 1"),
        ({"clients": {"num_clients": 4}}, "clients.num_clients was changed from 3 to 4"),
        ({"clients": {"mix": {"org/a": 1}}}, r"clients.mix was changed from {} to {'org/a': 1.0}"),
        ({"model": {"name": "org/b"}}, "model.name was changed from 'packaged:smollm2-135m-instruct' to 'org/b'"),
        (
            {"training": {"learning_rate": 0.1, "batch_size": 2}},
            "training.learning_rate was changed from 0.0005 to 0.1, training.batch_size was changed from 4 to 2",
        ),
        ({"evaluation": {"every": 3}}, "evaluation.every was changed from 2 to 3"),
    ],
)
def test_a_change_that_decides_numbers_is_refused(folder: RunFolder, sections: dict[str, Any], says: str) -> None:
    (folder.path / "config.yaml").write_text(dump_config(changed(**sections)), encoding="utf-8")
    with pytest.raises(RunFolderError, match=says):
        folder.settings_to_resume(folder.read_config())


def test_a_change_that_decides_none_is_honoured_whole(folder: RunFolder) -> None:
    now = changed(
        name="another", failures={"quorum": 0.1, "max_restarts": 9}, energy={"exclusive": True},
        resources={"fleet": "local", "max_workers": 7, "threads_per_worker": 2},
    )  # fmt: skip
    assert folder.settings_to_resume(now) == now


def test_dtype_auto_stands_for_what_it_came_to(folder: RunFolder) -> None:
    resolved = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"dtype": "float32"})})
    folder.write_config(resolved)
    assert folder.settings_to_resume(CONFIG) == resolved
    with pytest.raises(RunFolderError, match=r"model.dtype was changed from 'float32' to 'float16'"):
        folder.settings_to_resume(changed(model={"dtype": "float16"}))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_engine_auto_stands_for_the_one_that_the_run_began_with(folder: RunFolder, engine: str) -> None:
    resolved = changed(generation={"engine": engine})
    folder.write_config(resolved)
    assert folder.settings_to_resume(CONFIG) == resolved
    assert folder.settings_to_resume(folder.read_config()).generation.engine == engine
    other = {"transformers": "vllm", "vllm": "transformers"}[engine]
    with pytest.raises(RunFolderError, match=rf"generation.engine was changed from '{engine}' to '{other}'"):
        folder.settings_to_resume(changed(generation={"engine": other}))


def test_a_config_that_no_run_began_with_is_none_to_resume_or_to_refuse_as_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(RunFolderError, match=r"has no state/config.yaml, so no run has begun there"):
        RunFolder(tmp_path).settings_to_resume(CONFIG)
    with pytest.raises(RunFolderError, match="is not empty; choose another --out"):
        RunFolder.create(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["a b", "it's \"q\"", "50%25", "two\nlines", "[x]", "日本語", "x" * 250])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / name, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert RunFolder(tmp_path / name).read_config() == CONFIG


def test_half_a_file_is_not_left_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills_the_disk(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fills_the_disk)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}: the disk is full"):
        write_file(tmp_path / "table.csv", "a,b")
    assert not list(tmp_path.iterdir())


def no_locks(file: object, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_not_taken_for_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path / "lock", tmp_path), pytest.raises(RunFolderError, match="is in use by another process"), held(
        tmp_path / "lock", tmp_path
    ):
        pass
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RunFolderError, match=r"cannot lock .*: No locks available"), held(tmp_path / "lock", tmp_path):
        pass


def commit_of(round: int, **others: float) -> Commit:
    """A round of two clients, which are measured in all rounds but 1."""
    summary = RoundRow(
        round=round, started_at=10.0 * round, duration_seconds=5.0, num_participants=2, num_answered=2, lost="",
        failures="", num_labels=3, mean_agreement=0.5, label_churn=0.25,
    )  # fmt: skip
    metrics = tuple(
        MetricsRow(
            round=round, client_id=client, model="org/a", nll=2.0 - round / 10, perplexity=7.0, bits_per_byte=1.0,
            rouge_l=0.5, similarity=0.5, train_loss=1.0, num_private=4, num_pseudo_labels=3, others=others,
        )
        for client in (0, 1)
        if round != 1
    )  # fmt: skip
    row = LedgerRow(
        round=round, client_id=0, worker="worker-0", node="here", stage="fine_tune", started_at=10.0 * round,
        duration_seconds=1.0, tokens=round,
    )  # fmt: skip
    return Commit(summary=summary, metrics=metrics, ledger=(row,) * 3)


ROUNDS: dict[int, dict[str, float]] = {0: {}, 1: {}, 2: {"later": 0.5}, 3: {}}


def do_round(folder: RunFolder, round: int) -> None:
    if round == 2:
        folder.add_scores(2, {1: [TaskScore(task="arc", metric="acc", value=0.5, stderr=0.1, num_items=4)]})
    folder.commit(commit_of(round, **ROUNDS[round]), b"state")


def parts(folder: RunFolder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.glob("*.parquet/*")}


def test_a_round_writes_its_own_parts_and_touches_no_others(folder: RunFolder) -> None:
    for round in (0, 1, 2):
        do_round(folder, round)
    before = {path: path.stat().st_ino for path in folder.path.rglob("*") if path.is_file()}
    folder.commit(commit_of(3), b"state")
    after = {path: path.stat().st_ino for path in folder.path.rglob("*") if path.is_file()}
    written = {str(path.relative_to(folder.path)) for path in after if before.get(path) != after[path]}
    own = {f"{name}/round_000003.parquet" for name in TABLES}
    assert written == {*own, "state/round_003.msgpack", "state/server_003"}


def test_tables_are_one_to_pandas_whatever_their_rounds_have(folder: RunFolder) -> None:
    for round in ROUNDS:
        do_round(folder, round)
    metrics = pd.read_parquet(folder.path / "metrics.parquet").set_index(["round", "client_id"])
    assert metrics.index.tolist() == [(round, client) for round in (0, 2, 3) for client in (0, 1)]
    assert metrics["later"].dropna().to_dict() == {(2, 0): 0.5, (2, 1): 0.5}
    assert metrics["lm_eval/arc/acc"].dropna().to_dict() == {(2, 1): 0.5}
    assert pd.read_parquet(folder.path / "rounds.parquet")["round"].tolist() == [*ROUNDS]
    assert pd.read_parquet(folder.path / "ledger.parquet")["tokens"].sum() == 3 * sum(ROUNDS)


def test_rounds_beyond_a_thousand_stay_in_order(folder: RunFolder) -> None:
    for round in (0, 2, 999, 1000, 1001):
        folder.commit(commit_of(round), b"state")
    for read in (read_rounds, read_metrics, read_ledger):
        assert read(folder.path)["round"].drop_duplicates().tolist() == [0, 2, 999, 1000, 1001]


def test_scores_that_are_added_later_are_in_the_tables(folder: RunFolder) -> None:
    for round in ROUNDS:
        do_round(folder, round)
    folder.add_scores(3, {0: [TaskScore(task="ifeval", metric="acc", value=0.75, stderr=0.1, num_items=4)]})
    folder.write_tables(folder.commits())
    added = pd.read_parquet(folder.path / "metrics.parquet").set_index(["round", "client_id"])["lm_eval/ifeval/acc"]
    assert added.dropna().to_dict() == {(3, 0): 0.75}


def test_wherever_a_driver_is_killed_tables_can_be_read_and_resume_makes_them_the_same_to_the_bit(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for round in ROUNDS:
        do_round(folder, round)
    expected, is_whole, count = parts(folder), False, 0
    while not is_whole:
        killed, left, count = RunFolder.create(tmp_path / str(count), CONFIG), iter(range(count)), count + 1

        def write(path: Path, content: str | bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt  # before one file more is written than when it was killed last
            write_file(path, content)

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(run_folder, "write_file", write)
            for round in ROUNDS:
                do_round(killed, round)
            is_whole = True
        done = [commit.summary.round for commit in killed.commits()]
        if killed.has_tables():
            measured, told, worked = (
                [*read(killed.path)["round"].drop_duplicates()] for read in (read_metrics, read_rounds, read_ledger)
            )
            assert [*done, None][: len(worked)] == worked
            assert {*measured} <= {*told} <= {*worked}
            assert {*done[:-1]} - {1} <= {*measured}
        killed.write_tables(killed.commits())  # as resume does
        for round in [*ROUNDS][len(done) :]:
            do_round(killed, round)
        assert parts(killed) == expected
    assert count > 20


def test_a_table_of_an_earlier_version_becomes_one_with_parts(folder: RunFolder) -> None:
    for round in ROUNDS:
        do_round(folder, round)
    expected = parts(folder)
    for name in TABLES:
        whole = pd.read_parquet(folder.path / name)
        for path in (folder.path / name).iterdir():
            path.unlink()
        (folder.path / name).rmdir()
        whole.to_parquet(folder.path / name, index=False)
    assert len(read_metrics(folder.path)) == 6  # which can still be read
    folder.write_tables(folder.commits())
    assert parts(folder) == expected


def test_parts_that_are_right_are_left_alone(folder: RunFolder) -> None:
    for round in ROUNDS:
        do_round(folder, round)
    before = {path: path.stat().st_ino for path in folder.path.glob("*.parquet/*")}
    (damaged := folder.path / "rounds.parquet" / "round_000002.parquet").write_bytes(b"PAR1")
    folder.write_tables(folder.commits())
    after = {path: path.stat().st_ino for path in folder.path.glob("*.parquet/*")}
    assert {path for path in after if after[path] != before.get(path)} <= {damaged}
    assert read_rounds(folder.path)["round"].tolist() == [*ROUNDS]


def test_rounds_whose_commits_were_deleted_are_in_no_table(folder: RunFolder) -> None:
    for round in ROUNDS:
        do_round(folder, round)
    (folder.state / "round_003.msgpack").unlink()
    folder.write_tables(folder.commits())
    for read in (read_rounds, read_metrics, read_ledger):
        assert read(folder.path)["round"].max() == 2


def test_a_table_without_a_round_is_missing(folder: RunFolder) -> None:
    (folder.path / "rounds.parquet").mkdir()
    with pytest.raises(RunFolderError, match=r"rounds.parquet is missing: the run has not come that far"):
        read_rounds(folder.path)
