"""What trackers are told: each round once, whatever stops a run, with the numbers of its tables."""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config, validate_config
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.parts import BUILT_IN
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.run_folder import Commit, MetricsRow, RoundRow, RunFolder
from semcons_ray.runs.trackers import Series, Tracked, run_name, trackers
from semcons_ray.tracking.trackers import Past, Subject, TensorBoard
from tests.invariants.runs import Silent, StoppedError
from tests.reporting.builder import ledger_row, metrics_row
from tests.tracking.events import read_events


def commit(round: int, *metrics: MetricsRow, ledger: tuple[LedgerRow, ...] = ()) -> Commit:
    summary = RoundRow(
        round=round, started_at=10.0 * round, duration_seconds=4.0, num_participants=2, num_answered=1, lost="1",
        failures="it died", num_labels=5, mean_agreement=0.25, label_churn=math.nan,
    )  # fmt: skip
    return Commit(summary=summary, metrics=metrics, ledger=ledger)


def row(round: int, client: int, model: str = "m", **values: Any) -> MetricsRow:
    return MetricsRow(**metrics_row(round, client, model, **values))


def work(stage: str, seconds: float, source: str = "estimated", **values: Any) -> LedgerRow:
    return LedgerRow(**(ledger_row(1, 0, "w", stage, 0.0, seconds, source) | values))


def test_a_mean_counts_a_client_that_was_not_measured_with_its_last_measurement() -> None:
    series = Series()
    assert series.add(commit(0, row(0, 0, nll=4.0), row(0, 1, nll=2.0)))["mean/nll"] == 3.0
    assert not any(name.startswith(("mean/", "client_")) for name in series.add(commit(1)))
    values = series.add(commit(2, row(2, 1, nll=1.0)))
    assert values["client_1/nll"] == 1.0
    assert "client_0/nll" not in values
    assert values["mean/nll"] == 2.5


def test_nats_a_token_of_several_models_have_no_mean() -> None:
    own = [{"own_nll": 3.0, "own_bits_per_byte": bits} for bits in (4.0, 5.0)]
    rows = (row(0, 0, "m", bits_per_byte=1.0, others=own[0]), row(0, 1, "n", bits_per_byte=2.0, others=own[1]))
    values = Series().add(commit(0, *rows))
    assert (values["mean/bits_per_byte"], values["mean/own_bits_per_byte"]) == (1.5, 4.5)
    assert {"client_0/nll", "client_1/perplexity", "client_0/own_nll", "mean/rouge_l"} <= values.keys()
    assert not {"mean/nll", "mean/own_nll", "mean/perplexity", "mean/train_loss"} & values.keys()


def test_what_was_not_measured_is_left_out_and_so_is_its_mean() -> None:
    values = Series().add(commit(0, row(0, 0, rouge_l=math.nan), row(0, 1, rouge_l=0.5)))
    assert "client_0/rouge_l" not in values
    assert values["client_1/rouge_l"] == 0.5
    assert "mean/rouge_l" not in values
    assert {name: value for name, value in values.items() if name.startswith("round/")} == {
        "round/duration_seconds": 4.0,
        "round/num_participants": 2.0,
        "round/num_answered": 1.0,
        "round/num_labels": 5.0,
        "round/mean_agreement": 0.25,
    }


def test_metrics_asked_for_and_scores_in_tasks_are_sent_too() -> None:
    one, other = row(0, 0), msgspec.structs.replace(row(0, 1), others={"exact_match": 0.5})
    scores = pd.DataFrame({"lm_eval/t/acc": [0.25, 0.75], "lm_eval/t/acc_stderr": [0.1, math.nan]}, index=[0, 1])
    values = Series().add(commit(0, one, other), scores)
    assert values["client_1/exact_match"] == 0.5
    assert "mean/exact_match" not in values  # the other has none
    assert (values["client_0/lm_eval/t/acc"], values["mean/lm_eval/t/acc"]) == (0.25, 0.5)
    assert values["client_0/lm_eval/t/acc_stderr"] == 0.1
    assert "client_1/lm_eval/t/acc_stderr" not in values


def test_totals_add_up_over_rounds() -> None:
    series = Series()
    first = (
        work("fine_tune", 2.0, tokens=7, downlink_bytes=50, energy_joules=20.0),
        work("generate", 1.0, "unavailable", tokens=3, uplink_bytes=9, energy_joules=math.nan, cost_usd=0.75),
        work("idle", 100.0, energy_joules=1.0),
    )
    series.add(commit(0, ledger=first))
    values = series.add(commit(1, ledger=(work("generate", 0.5, tokens=1, uplink_bytes=1, energy_joules=5.0),)))
    assert {name: value for name, value in values.items() if name.startswith("total/")} == {
        "total/cost_usd": 0.75,
        "total/uplink_bytes": 10,
        "total/downlink_bytes": 50,
        "total/tokens": 11,
        "total/seconds": 3.5,
        "total/energy_joules": 26.0,
    }
    unknown = Series().add(commit(0, ledger=(work("idle", 1.0, "unavailable", energy_joules=math.nan),)))
    assert "total/energy_joules" not in unknown


class Remote:
    """A tracker elsewhere, which keeps what it is sent after this process is gone."""

    runs: dict[str, list[int]]

    def __init__(self, subject: Subject, past: Past) -> None:
        self.past = Past(past.name, past.id or f"run-{len(self.runs)}", past.sent)
        self.steps = self.runs.setdefault(self.past.id, [])

    @staticmethod
    def check() -> None:
        pass

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self, *, finished: bool) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", validate_config({"num_rounds": 3}, where="test"))


def test_a_run_that_goes_on_is_the_same_run_there_and_no_round_is_sent_twice_or_left_out(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Remote.runs = {}
    monkeypatch.setitem(BUILT_IN["tracker"], "remote", f"{__name__}:Remote")
    config = folder.read_config()
    first = Tracked("remote", folder, config)
    first.begins([commit(0), commit(1)])  # committed before it was asked for
    first.round_ends(commit(2))
    Tracked("remote", folder, config).begins([commit(0), commit(1), commit(2), commit(3)])  # the first was killed
    assert Remote.runs == {"run-0": [0, 1, 2, 3]}


class Lines:
    """A tracker that keeps no id: one line a round, in a file of its folder."""

    def __init__(self, subject: Subject, *, digits: int = 2) -> None:
        self.file, self.digits = subject.folder / "lines.txt", digits

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(f"{step} {values['round/num_labels']:.{self.digits}f}\n")

    def close(self, *, finished: bool) -> None:
        with self.file.open("a") as file:
            file.write(f"{finished}\n")


def test_a_tracker_of_ones_own_needs_two_methods_and_is_sent_no_round_twice(folder: RunFolder) -> None:
    name = f"{__name__}:Lines"
    values = {"num_rounds": 3, "tracking": {"report_to": name, "options": {name: {"digits": 1}}}}
    config = validate_config(values, where="test")
    first = Tracked(name, folder, config)
    first.begins([commit(0)])
    first.round_ends(commit(1))
    second = Tracked(name, folder, config)  # the first was killed
    second.begins([commit(0), commit(1), commit(2)])
    second.ends(finished=True)
    assert (folder.path / "lines.txt").read_text() == "0 5.0\n1 5.0\n2 5.0\nTrue\n"
    assert [observer.name for observer in trackers(config, folder)] == [f"tracking by {kind}" for kind in
                                                                       ("tensorboard", name)]  # fmt: skip


def test_a_run_is_called_as_its_folder_unless_it_has_a_title(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    assert run_name(validate_config({}, where="test"), tmp_path / "first") == "first"
    assert run_name(validate_config({"name": "FedProx, seed 1"}, where="test"), tmp_path) == "FedProx, seed 1"


@pytest.mark.slow
@pytest.mark.real
def test_tensorboards_files_hold_every_number_once_after_a_stop_as_well(
    tiny_config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    def stop(reply: Any) -> None:
        if reply.round == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_experiment(tiny_config(), tmp_path / "run", Silent(stop))
    assert {*read_events(tmp_path / "run" / "tensorboard")["mean/nll"]} == {0, 1}
    resume_experiment(tmp_path / "run")
    scalars = read_events(tmp_path / "run" / "tensorboard")
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    for at in metrics.to_dict("records"):
        for name in ("nll", "perplexity", "bits_per_byte", "rouge_l", "similarity", "train_loss", "num_private"):
            sent = scalars.get(f"client_{at['client_id']}/{name}", {}).get(at["round"], [])
            assert sent == ([] if math.isnan(at[name]) else [pytest.approx(at[name], rel=1e-6)])
    assert {step: len(values) for step, values in scalars["round/num_labels"].items()} == {0: 1, 1: 1, 2: 1}
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert scalars["total/uplink_bytes"][2] == [ledger["uplink_bytes"].sum()]


@pytest.mark.parametrize("command", ["run", "compare", "sweep"])
@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_any_work(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not there, where it is
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(validate_config({}, where="test")))
    if command == "sweep":
        config.write_text("space: {prompts.budget: {grid: [6]}}")
    arguments = [command, str(config), "--tracking.report_to", kind, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"semcons: tracking.report_to: {kind} is not installed")
    assert line.endswith(f": pip install {kind}")
    assert not (tmp_path / "out").exists()


def test_a_folder_called_as_a_package_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "wandb" in sys.modules:
        pytest.skip("W&B is installed")
    (tmp_path / "wandb").mkdir()  # W&B makes one where it is started
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["run", "--tracking.report_to", "wandb", "--out", "out"]) == 2
    assert capsys.readouterr().err == "semcons: tracking.report_to: wandb is not installed: pip install wandb\n"


@pytest.mark.slow
@pytest.mark.real
def test_a_tracker_that_fails_costs_the_run_nothing(
    tiny_config: Callable[..., ExperimentConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(TensorBoard, "log", fail)
    folder = run_experiment(tiny_config(num_rounds=1), tmp_path / "run")
    assert folder.is_finished(1)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == ["tracking by tensorboard failed, and is left out from now on: nobody answers"]
