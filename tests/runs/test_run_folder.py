"""What a run's folder holds of its settings, and what may be changed on the way."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.config import ExperimentConfig, dump_config, validate_config
from semcons_ray.errors import RunFolderError, StorageError
from semcons_ray.runs.run_folder import RunFolder, held, write_file

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
