"""What may happen to a run before it goes on: it is moved, edited, partly deleted, terminated, or its disk is full."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def finished(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_experiment(tiny_config(clients={"num_clients": 2}), out, Silent())
    return out


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run without its last round, at another place; its adapters, which are of that round, are there still."""
    copy = tmp_path / "moved" / "run"
    shutil.copytree(finished, copy)
    for path in [*copy.glob("state/*_002*"), *copy.glob("state/client_*/round_002*")]:
        path.unlink()
    for path in copy.glob("adapters/*/adapter_model.safetensors"):
        path.write_bytes(b"of another time")
    return copy


def edit(run: Path, before: str, after: str) -> None:
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert before in text
    (run / "config.yaml").write_text(text.replace(before, after), encoding="utf-8")


def test_a_moved_run_goes_on_and_its_adapters_are_written_anew(finished: Path, unfinished: Path) -> None:
    resume_experiment(unfinished, Silent())
    assert_same_run(finished, unfinished)


def test_an_engine_that_is_left_open_is_chosen_once(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU it is transformers, to the bit; and it stays so if a run goes on where another would be chosen."""
    small = {"clients": {"num_clients": 2}}
    run_experiment(tiny_config(**small), tmp_path / "named", Silent())
    observer = Silent()
    run_experiment(tiny_config(**small, generation={"engine": "auto"}), tmp_path / "open", observer)
    assert observer.plan.endswith("\n  generation.engine auto is transformers: clients compute on the CPU")
    assert_same_run(tmp_path / "named", tmp_path / "open")
    for name in ("config.yaml", "state/config.yaml"):
        assert (tmp_path / "named" / name).read_text() == (tmp_path / "open" / name).read_text()
    for path in [*tmp_path.glob("open/state/*_002*"), *tmp_path.glob("open/state/client_*/round_002*")]:
        path.unlink()
    monkeypatch.setattr("semcons_ray.runs.assembly._why_not_vllm", lambda config: None)
    edit(tmp_path / "open", "engine: transformers", "engine: auto")
    resume_experiment(tmp_path / "open", Silent())
    assert_same_run(tmp_path / "named", tmp_path / "open")


def test_where_and_how_it_runs_may_be_changed_and_stays_changed(finished: Path, unfinished: Path) -> None:
    edit(unfinished, "max_restarts: 2", "max_restarts: 0")
    edit(unfinished, "threads_per_worker: 1", "threads_per_worker: 1\n  max_workers: 1")
    edit(unfinished, "  max_workers: null\n", "")
    resume_experiment(unfinished, Silent())
    assert_same_run(finished, unfinished)
    for name in ("config.yaml", "state/config.yaml"):
        settings = yaml.safe_load((unfinished / name).read_text(encoding="utf-8"))
        assert settings["failures"]["max_restarts"] == 0
        assert settings["resources"]["max_workers"] == 1


def test_an_edit_of_what_decides_numbers_is_refused_before_any_work(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(unfinished, "num_rounds: 2", "num_rounds: 4")
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    assert main(["resume", str(unfinished)]) == 2
    # A progress bar of the fixtures may end its line as late as here.
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{unfinished}: num_rounds was changed from 2 to 4 since it began; set that back" in line
    assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == before


def test_relative_paths_hold_from_any_folder(
    tiny_config: MakeConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(clients={"num_clients": 2})
    (tmp_path / "model").symlink_to(config.model.name)
    (tmp_path / "data.jsonl").symlink_to(config.data.source)
    monkeypatch.chdir(tmp_path)
    values = config.model_dump(mode="json")
    values["model"]["name"], values["data"]["source"], values["num_rounds"] = "./model", "data.jsonl", 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "config.yaml", "--out", "run"]) == 0
    (tmp_path / "run" / "state" / "round_001.msgpack").unlink()
    monkeypatch.chdir("/")
    assert main(["resume", str(tmp_path / "run")]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["model"]["name"] == str(tmp_path / "model")
    assert settings["data"]["source"] == str(tmp_path / "data.jsonl")


# Signals


@pytest.fixture
def start(tiny_config: MakeConfig, tmp_path: Path) -> Iterator[Start]:
    """Starts a command over long runs, in a session of its own; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def make(command: str, fleet: str, out: Path) -> "subprocess.Popen[str]":
        resources = {"fleet": fleet, "device": "cpu", "max_workers": 1}
        config = tiny_config(num_rounds=200, clients={"num_clients": 2}, resources=resources)
        values = yaml.safe_load(dump_config(config))
        if command == "compare":
            values = {"seeds": [0, 1], "experiment": values, "arms": {"a": {}}}
        if command == "sweep":
            values = {"experiment": values, "space": {"training.learning_rate": {"grid": [1e-3, 2e-3]}}}
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
        words = [sys.executable, "-m", "semcons_ray.commands.cli", command, str(tmp_path / "settings.yaml")]
        process = subprocess.Popen(
            [*words, "--out", str(out)], start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield make
    for process in started:
        process.kill()
        process.wait()


def wait_for(pattern: str, out: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while not list(out.glob(pattern)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_terminated(process: "subprocess.Popen[str]", errors: str, goes_on: str) -> None:
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1] == f"terminated; {goes_on} goes on with what is not finished"
    assert not re.search("Traceback|SIGTERM|stack trace|Exception ignored", errors)


LONG = [pytest.mark.long, pytest.mark.ray]


@pytest.mark.parametrize(
    ("command", "fleet", "at", "kill"),
    [
        ("run", "local", "state/round_002.msgpack", os.kill),
        ("run", "local", "data.parquet", os.killpg),
        pytest.param("run", "ray", "state/round_002.msgpack", os.killpg, marks=LONG),
        pytest.param("run", "ray", "data.parquet", os.kill, marks=LONG),
        pytest.param("run", "ray", "state/.mark-*", os.kill, marks=LONG),
        ("compare", "local", "runs/*/*/state/round_001.msgpack", os.killpg),
        pytest.param("sweep", "local", "trials/*/state/round_001.msgpack", os.kill, marks=LONG),
    ],
)
def test_sigterm_to_the_process_or_its_group_is_one_line_and_143(
    command: str, fleet: str, at: str, kill: Callable[[int, int], None], start: Start, tmp_path: Path
) -> None:
    for attempt in range(3):
        out = tmp_path / str(attempt)
        process = start(command, fleet, out)
        wait_for(at, out, process)
        kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        # The whole group gets the signal: if Ray's raylet is gone first, Ray itself ends the driver, with 1.
        if not (fleet == "ray" and kill is os.killpg and process.returncode == 1):
            break
    assert_terminated(process, errors, "semcons resume" if command == "run" else "the same command")


# Storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a small disk needs the rights to")
    yield disk
    # Lazily, as pytest keeps what was logged, and with an error's frames a tensor that is a file's memory.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("fleet", ["local", pytest.param("ray", marks=LONG)])
def test_a_full_disk_ends_a_run_in_one_line_and_with_room_it_goes_on_to_the_same_numbers(
    fleet: str,
    tiny_config: MakeConfig,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if fleet == "ray":
        request.getfixturevalue("one_cluster")
    make = {"num_rounds": 2, "clients": {"num_clients": 2}, "training": {"keep_optimizer": True}}
    run_experiment(tiny_config(**make), tmp_path / "undisturbed", Silent())
    config = tiny_config(**make, resources={"fleet": fleet, "device": "cpu", "max_workers": 1})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert main(["run", str(tmp_path / "config.yaml"), "--out", str(small_disk / "run")]) == 2
    errors = capsys.readouterr().err
    assert f"semcons: cannot write {small_disk}/run" in errors.splitlines()[-1]
    assert "the disk is full; make room, and semcons resume goes on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not [path for path in (small_disk / "run").rglob(".*") if not path.name.startswith(".mark-")]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert main(["resume", str(small_disk / "run")]) == 0
    assert_same_run(tmp_path / "undisturbed", small_disk / "run")


def test_a_disk_that_became_read_only_is_named(
    unfinished: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    shutil.copytree(unfinished, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for command in ("resume", "report"):
        assert main([command, str(small_disk / "run")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"cannot write {small_disk}/run: the file system is read-only" in line
