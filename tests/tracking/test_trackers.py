"""The real libraries, offline: each holds the numbers of metrics.parquet, read back by its own API."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.tracking.trackers import Past, Subject, Trackio
from tests.invariants.runs import Silent, StoppedError, assert_same_run

pytestmark = [
    pytest.mark.trackers,
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),  # their own
]

ALL = ["wandb", "mlflow", "trackio"]
METRICS = ["nll", "perplexity", "bits_per_byte", "rouge_l", "similarity", "train_loss", "num_private",
           "num_pseudo_labels"]  # fmt: skip

Numbers = dict[tuple[int, str], float]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all of them write. Set before any is imported."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            patch.delenv(name)
        for name, value in {
            "HOME": str(home),
            "WANDB_MODE": "offline",
            "WANDB_PROJECT": "federated",
            "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
            "MLFLOW_EXPERIMENT_NAME": "federated",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TRACKIO_DIR": f"{home}/trackio",
            "TRACKIO_PROJECT": "federated",
        }.items():
            patch.setenv(name, value)
        for name in ALL:
            pytest.importorskip(name, reason="needs trackers: pip install --no-deps -r requirements-trackers.lock")
        yield home


@pytest.fixture(scope="module")
def run(home: Path, tiny_config: Callable[..., ExperimentConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reports to all three from its second round on, and was stopped twice."""

    def stop(reply: Any) -> None:
        if reply.round == 2 and reply.client_id == 0:
            raise StoppedError

    folder = tmp_path_factory.mktemp("runs") / "first"
    for report_to in ([], ALL):
        config = tiny_config(num_rounds=2, clients={"num_clients": 2}, tracking={"report_to": report_to})
        with pytest.raises(StoppedError):
            if folder.exists():
                (folder / "config.yaml").write_text(dump_config(config))
                resume_experiment(folder, Silent(stop))
            else:
                run_experiment(config, folder, Silent(stop))
    resume_experiment(folder)
    return folder


@pytest.fixture(scope="module")
def numbers(run: Path) -> Numbers:
    """By round and name, the numbers of metrics.parquet."""
    rows = pd.read_parquet(run / "metrics.parquet").to_dict("records")
    return {
        (row["round"], f"client_{row['client_id']}/{name}"): row[name]
        for row in rows
        for name in METRICS
        if not math.isnan(row[name])
    }


def of_clients(values: Numbers) -> Numbers:
    return {key: value for key, value in values.items() if key[1].startswith("client_")}


def check(values: Numbers, numbers: Numbers, run: Path) -> None:
    """The numbers of clients are those of metrics.parquet, to the last bit; the others those of the other tables."""
    assert of_clients(values) == numbers
    rounds, ledger = (pd.read_parquet(run / f"{name}.parquet") for name in ("rounds", "ledger"))
    metrics = pd.read_parquet(run / "metrics.parquet")
    for round in range(3):
        assert values[round, "round/num_labels"] == rounds["num_labels"][round]
        assert values[round, "mean/nll"] == pytest.approx(metrics.loc[metrics["round"] == round, "nll"].mean())
    assert values[2, "total/uplink_bytes"] == ledger["uplink_bytes"].sum() > 0
    assert values[1, "round/mean_agreement"] == rounds["mean_agreement"][1]


def test_trackers_change_no_result(run: Path, tiny_config: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    run_experiment(tiny_config(num_rounds=2, clients={"num_clients": 2}), tmp_path / "plain")
    assert_same_run(run, tmp_path / "plain")


def inspect(path: Path) -> list[dict[str, Any]]:
    """The records of a run of W&B."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_wandb_holds_each_round_once_in_one_run(run: Path, numbers: Numbers) -> None:
    paths = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(paths) == 2  # a process each, of one run
    assert len({path.name for path in paths}) == 1
    values: Numbers = {}
    for item in [
        record["history"]["item"] for path in paths for record in inspect(path) if record["type"] == "history"
    ]:
        sent = {(item["_step"], name): value for name, value in item.items() if "/" in name}
        assert not sent.keys() & values.keys()
        values |= sent
    check(values, numbers, run)
    (begun,) = [record["run"] for record in inspect(paths[0]) if record["type"] == "run"]
    assert (begun["display_name"], begun["project"]) == ("first", "federated")
    assert begun["config"]["update"]["clients"]["num_clients"] == 2


def test_mlflow_holds_each_round_once_in_one_run(run: Path, numbers: Numbers) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("federated")
    (tracked,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'first'")
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["clients.num_clients"] == "2"
    assert tracked.data.params["model.dtype"] == "float32"
    values: Numbers = {}
    for name in tracked.data.metrics:
        for metric in client.get_metric_history(tracked.info.run_id, name):
            assert (metric.step, name) not in values
            values[metric.step, name] = metric.value
    check(values, numbers, run)


def logs_of_trackio(name: str) -> list[dict[str, Any]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (tracked,) = [each for each in trackio.Api().runs("federated") if each.name == name]
    return SQLiteStorage.get_logs("federated", name, run_id=tracked.id)


def test_trackio_holds_each_round_once_in_one_run(run: Path, numbers: Numbers) -> None:
    logs = logs_of_trackio("first")
    assert [log["step"] for log in logs] == [0, 1, 2]
    values = {(log["step"], name): value for log in logs for name, value in log.items() if "/" in name}
    check(values, numbers, run)


def test_trackio_is_sent_again_what_a_killed_process_kept_to_itself(tmp_path: Path) -> None:
    import trackio

    subject = Subject(tmp_path, {})
    first = Trackio(subject, Past("killed"))
    first.log(0, 0.0, {"x": 1.0})
    first.close(finished=False)
    again = Trackio(subject, Past("killed", first.past.id, sent=1))
    assert again.past.sent == 0
    again.close(finished=False)
    other = Trackio(subject, Past("killed"))
    other.log(0, 0.0, {"x": 1.0})
    other.close(finished=True)
    with pytest.raises(RuntimeError, match="a later run of its project is called killed as well"):
        Trackio(subject, Past("killed", first.past.id, sent=1))
    assert trackio.context_vars.current_run.get() is None, "what is left open is finished on stdout as the process ends"


def test_tensorboard_itself_reads_the_numbers(run: Path, numbers: Numbers) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard")).Reload()
    values = {(event.step, tag): event.value for tag in read.Tags()["scalars"] for event in read.Scalars(tag)}
    assert of_clients(values) == {key: pytest.approx(value, rel=1e-6) for key, value in numbers.items()}
    assert "config/text_summary" in read.Tags()["tensors"]


def test_each_run_of_a_comparison_is_a_run_there(
    home: Path, tiny_config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    experiment = tiny_config(num_rounds=1, clients={"num_clients": 2}).model_dump(mode="json", exclude={"name", "seed"})
    arms = {"consensus": {}, "alone": {"algorithm": {"name": "local_only"}}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({"seeds": [3], "experiment": experiment, "arms": arms}))
    arguments = ["compare", str(tmp_path / "compare.yaml"), "--tracking.report_to", "trackio"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    for arm in arms:
        nll = pd.read_parquet(tmp_path / "out" / "runs" / arm / "seed_3" / "metrics.parquet").set_index("round")["nll"]
        sent = {log["step"]: log["client_0/nll"] for log in logs_of_trackio(f"{arm}, seed 3")}
        assert sent == {round: nll[round].tolist()[0] for round in (0, 1)}


@pytest.mark.ray
def test_a_trial_of_a_sweep_is_a_run_there(
    home: Path, tiny_config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    experiment = tiny_config(num_rounds=1, clients={"num_clients": 2}).model_dump(mode="json", exclude={"name"})
    sweep = {"experiment": experiment, "space": {"prompts.budget": {"grid": [4]}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    arguments = ["sweep", str(tmp_path / "sweep.yaml"), "--tracking.report_to", "[trackio]"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (trial,) = (tmp_path / "out" / "trials").glob("budget-4-*")
    nll = pd.read_parquet(trial / "metrics.parquet").set_index("round")["nll"]
    sent = {log["step"]: log["client_0/nll"] for log in logs_of_trackio("budget=4")}
    assert sent == {round: nll[round].tolist()[0] for round in (0, 1)}


def semcons(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "semcons_ray.commands.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})


@pytest.mark.parametrize(
    ("kind", "variables", "says"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "wandb has no API key: run `wandb login`, or set WANDB_API_KEY"),
        (
            "mlflow",
            {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
            "mlflow cannot use its store",
        ),
    ],
)
def test_a_tracker_that_cannot_be_reached_is_named_before_any_work(
    kind: str, variables: dict[str, str], says: str, tmp_path: Path
) -> None:
    done = semcons("run", "--tracking.report_to", kind, "--out", str(tmp_path / "out"), **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"semcons: tracking.report_to: {says}")
    assert not (tmp_path / "out").exists()
