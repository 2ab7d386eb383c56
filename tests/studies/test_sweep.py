"""Real sweeps of tiny models."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig
from semcons_ray.runs.experiment import run_experiment
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies import sweep as module
from semcons_ray.studies.search_space import SweepConfig, load_sweep

pytestmark = [
    *(pytest.mark.long, pytest.mark.ray, pytest.mark.slow, pytest.mark.real),
    pytest.mark.usefixtures("one_cluster"),
]


@pytest.fixture(scope="module")
def values(tiny_config: Callable[..., ExperimentConfig]) -> dict[str, Any]:
    """A sweep of four trials on tiny models."""
    experiment = tiny_config(clients={"num_clients": 2}).model_dump(mode="json", exclude={"name"})
    return {
        "name": "tiny",
        "experiment": experiment,
        "space": {"prompts.budget": {"grid": [4, 6]}, "clients.num_clients": {"grid": [2, 3]}},
        "max_concurrent_trials": 1,
    }


def write(folder: Path, values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def finished(out: Path) -> list[Path]:
    return [path for path in sorted(out.glob("trials/[!.]*")) if RunFolder(path).is_finished(2)]


@pytest.fixture(scope="module")
def killed(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was killed when one trial was finished and another had committed a round."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "sweep", str(write(folder, values)), "--out"]
    process = subprocess.Popen([*command, str(folder / "out")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(folder.glob("out/trials/*/state/round_001.msgpack"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    return folder / "out"


def test_a_killed_sweep_goes_on_and_repeats_nothing(
    killed: Path, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At once, when processes of the killed one may still be about to end.
    kept = {path: path.stat().st_mtime_ns for trial in finished(killed) for path in trial.rglob("*.msgpack")}
    begun = {path: path.stat().st_mtime_ns for path in killed.glob("trials/*/state/round_001.msgpack")}
    assert kept
    before = finished(killed)
    done = len(before)
    assert done < 4
    assert main(["sweep", str(write(tmp_path, values)), "--out", str(killed)]) == 0
    captured = capsys.readouterr()
    assert f"{done} of 4 trials are finished" in captured.err
    assert {path: path.stat().st_mtime_ns for path in kept | begun} == kept | begun
    assert len(finished(killed)) == 4
    table = pd.read_csv(killed / "trials.csv")
    assert table["status"].tolist() == ["finished"] * 4
    assert table["bits_per_byte"].is_monotonic_increasing
    assert table["mean_nll"].is_monotonic_increasing  # the same, of one model
    assert set(zip(table["prompts.budget"], table["clients.num_clients"], strict=True)) == {
        (4, 2), (4, 3), (6, 2), (6, 3),
    }  # fmt: skip
    pd.testing.assert_frame_equal(table, pd.read_parquet(killed / "trials.parquet"), check_dtype=False)
    page = (killed / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure id="figure-front-') == 3
    assert page.count('<figure id="figure-effect-') == 2
    assert load_sweep(killed / "sweep.yaml").points() == SweepConfig.model_validate(values).points()
    for trial in table["trial"]:
        logged = killed / "tune" / trial
        if logged.parent.parent / "trials" / trial not in before:  # whose logs the kill may have cut off
            results = [json.loads(line) for line in (logged / "result.json").read_text().splitlines()]
            assert results[-1]["round"] == 2
            assert (logged / "progress.csv").is_file()
        assert list((killed / "trials" / trial / "tensorboard").glob("events.out.tfevents.*"))
    capsys.readouterr()
    assert main(["sweep", str(write(tmp_path, values)), "--out", str(killed)]) == 0
    assert capsys.readouterr().err == "4 of 4 trials are finished\n"


def test_a_sweep_at_a_url_goes_on_from_there_on_another_machine(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = iter(tmp_path / name for name in ("one", "other"))
    monkeypatch.setattr("semcons_ray.runs.remote_folder.cache_dir", lambda: next(caches) / "cache")
    url, store = f"file://{tmp_path}/store", tmp_path / "store"
    values = {**values, "experiment": {**values["experiment"], "num_rounds": 1}}
    first = {**values, "space": {"prompts.budget": {"grid": [4]}}}
    assert main(["sweep", str(write(tmp_path, first)), "--out", url]) == 0
    assert f"report: {url}/report.html" in capsys.readouterr().out
    assert {"sweep.yaml", "trials.csv", "report.html", "tune"} <= {path.name for path in store.iterdir()}
    (trial,) = store.glob("trials/*")
    assert RunFolder(trial).is_finished(1)
    before = {path: path.stat().st_mtime_ns for path in trial.rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "one")
    more = {**values, "space": {"prompts.budget": {"grid": [4, 6]}}}
    assert main(["sweep", str(write(tmp_path, more)), "--out", url]) == 0
    assert capsys.readouterr().err.startswith("1 of 2 trials are finished\n")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [RunFolder(path).is_finished(1) for path in store.glob("trials/*")] == [True, True]
    assert pd.read_csv(store / "trials.csv")["status"].tolist() == ["finished"] * 2


def test_a_sweep_with_another_experiment_is_named_and_left_alone(
    killed: Path, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (killed / "sweep.yaml").read_bytes()
    arguments = ["sweep", str(write(tmp_path, values)), "--training.learning_rate", "0.1", "--out", str(killed)]
    assert main(arguments) == 2
    assert "training.learning_rate was changed from 0.005 to 0.1 since it began" in capsys.readouterr().err
    assert (killed / "sweep.yaml").read_bytes() == before


def test_trials_on_ray_have_the_numbers_of_plain_runs_and_no_more_than_their_share(
    values: dict[str, Any], tmp_path: Path
) -> None:
    resources = {"fleet": "ray", "device": "cpu", "max_workers": 1}
    sweep = {**values, "max_concurrent_trials": 2, "space": {"prompts.budget": {"grid": [4, 6]}}}
    sweep["experiment"] = {**values["experiment"], "num_rounds": 1, "resources": resources}
    assert main(["sweep", str(write(tmp_path, sweep)), "--out", str(tmp_path / "out")]) == 0
    for trial in tmp_path.glob("out/trials/[!.]*"):
        placement = json.loads((trial / "placement.json").read_text())
        assert [node["cpus"] for node in placement["nodes"]] == [1.0]
        assert [worker["node_id"] for worker in placement["workers"]] == ["0"]
    config = load_sweep(tmp_path / "sweep.yaml").configure({"prompts.budget": 4})
    local = config.resources.model_copy(update={"fleet": "local"})
    run_experiment(config.model_copy(update={"resources": local}), tmp_path / "plain")
    (same,) = tmp_path.glob("out/trials/budget-4-*")
    tables = [pd.read_parquet(folder / "metrics.parquet") for folder in (same, tmp_path / "plain")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_asha_stops_what_falls_behind_and_a_resumed_sweep_leaves_it(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = {**values, "scheduler": "asha", "space": {"training.learning_rate": {"grid": [2e-2, 1e-9]}}}
    sweep["experiment"] = {**values["experiment"], "num_rounds": 3}
    arguments = ["sweep", str(write(tmp_path, sweep)), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "1e-09: bits_per_byte" in (told := capsys.readouterr().err)
    assert "stopped after round 1" in told
    table = pd.read_csv(tmp_path / "out" / "trials.csv").set_index("training.learning_rate")
    assert table["status"].to_dict() == {2e-2: "finished", 1e-9: "stopped"}
    assert table["rounds"].to_dict() == {2e-2: 3, 1e-9: 1}
    assert main(arguments) == 0
    assert capsys.readouterr().err == "2 of 2 trials are finished\n"


def test_optuna_is_told_what_was_done_and_only_tries_what_is_left(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {
        "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "algorithm.rule": {"choice": ["medoid", "longest"]},
    }
    sweep = {**values, "search": "optuna", "num_samples": 2, "space": space}
    sweep["experiment"] = {**values["experiment"], "num_rounds": 1}
    assert main(["sweep", str(write(tmp_path, sweep)), "--out", str(tmp_path / "out")]) == 0
    first = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert len(first) == 2
    sweep["num_samples"] = 3
    assert main(["sweep", str(write(tmp_path, sweep)), "--out", str(tmp_path / "out")]) == 0
    assert "2 of 3 trials are finished" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert table["training.learning_rate"].nunique() == 3
    assert set(first["trial"]) < set(table["trial"])


def test_a_trial_that_fails_is_named_and_the_others_go_on(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"model.lora.target_modules": {"grid": [["nowhere"], ["q_proj"]]}}
    sweep = {**values, "space": space, "experiment": {**values["experiment"], "num_rounds": 1}}
    assert main(["sweep", str(write(tmp_path, sweep)), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    (failed,) = [line for line in captured.err.splitlines() if "failed: " in line]
    assert "model.lora.target_modules" in failed
    table = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert sorted(table["status"]) == ["finished", "unfinished"]


def test_past_trials_count_for_asha(values: dict[str, Any], tmp_path: Path) -> None:
    sweep = SweepConfig.model_validate({**values, "scheduler": "asha"})
    past: Any = SimpleNamespace(
        name="past",
        config=sweep.configure(sweep.points()[0]),
        rounds=lambda: pd.DataFrame({"bits_per_byte": [5.0, 1.0, 0.9]}, index=[0, 1, 2]),
    )
    scheduler = module._scheduler(sweep, [past])
    assert scheduler is not None
    new: Any = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, new)  # type: ignore[arg-type]
    worse = scheduler.on_trial_result(None, new, {"round": 1, "bits_per_byte": 2.0})  # type: ignore[arg-type]
    assert worse == TrialScheduler.STOP
