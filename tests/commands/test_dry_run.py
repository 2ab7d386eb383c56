"""A dry run foretells what a run does, refuses what it would refuse, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.reporting.progress import Progress
from semcons_ray.runs.experiment import plan_experiment, run_experiment
from semcons_ray.runs.forecast import Forecast, Load, Speed, measure
from semcons_ray.runs.observers import StagesOnly
from tests.invariants.runs import Silent

pytestmark = pytest.mark.real

Make = Callable[..., ExperimentConfig]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "semantic_consensus": {},
    "own_answer": {"algorithm": {"rule": "own_answer"}},
    "logit_exchange": {"algorithm": {"name": "logit_exchange"}},
    "local_only": {"algorithm": {"name": "local_only"}},
    "centralized": {"algorithm": {"name": "centralized"}},
    "fedavg_lora": {"algorithm": {"name": "fedavg_lora"}, "training": {"local_steps": 2}},
    "own labels": {"algorithm": {"name": "fedavg_lora", "self_labels": True}},
    "one_shot_fedavg_lora": {"algorithm": {"name": "one_shot_fedavg_lora"}},
    "scaffold": {"algorithm": {"name": "scaffold"}},
    "ffa_lora": {"algorithm": {"name": "ffa_lora"}},
    "hetlora": {"algorithm": {"name": "hetlora"}, "clients": {"lora_ranks": [32, 16]}},
    "flora": {"algorithm": {"name": "flora"}, "clients": {"lora_ranks": [32, 16]}},
    "fedavgm": {"algorithm": {"name": "fedavgm", "options": {"momentum": 0.5}}},
    "fedadam": {"algorithm": {"name": "fedadam"}},
    "fedex_lora": {"algorithm": {"name": "fedex_lora"}, "clients": {"num_clients": 4}},
    "fedsa_lora": {"algorithm": {"name": "fedsa_lora"}},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_foretold_happens(name: str, tmp_path: Path, tiny_config: Make) -> None:
    given = ALGORITHMS[name]
    alone = ("local_only", "centralized", "logit_exchange")
    averages = "algorithm" in given and "name" in given["algorithm"] and name not in alone
    weights = {"weight_dtype": "float32"} if averages else {}
    config = tiny_config(
        num_rounds=4,
        algorithm=given.get("algorithm", {}) | weights | ({"compression": "none"} if name != "centralized" else {}),
        clients=given.get("clients", {}) | ({"participation": 0.6} if name != "centralized" else {}),
        model={"lora": {"rank": 32}},
        training=given.get("training", {"local_epochs": 2, "batch_size": 5}),
        evaluation={"every": 3, "num_answers": 0},
    )
    forecast = Forecast(plan_experiment(config, Silent()))
    run_experiment(config, tmp_path / "run", Silent())
    ledger = pd.read_parquet(tmp_path / "run/ledger.parquet")
    by_round = ledger.groupby(["round", "stage"])[["tokens", "uplink_bytes", "downlink_bytes"]].sum()
    for round, load in enumerate(forecast.rounds):
        found = by_round.loc[round]
        if name != "logit_exchange":  # which scores its answers where it gives them
            assert found["tokens"].get("evaluate", 0) == pytest.approx(load.scored)
        learns = name in ("semantic_consensus", "own_answer", "own labels", "logit_exchange") and round > 2
        trained = found["tokens"].get("fine_tune", 0)
        assert trained == pytest.approx(load.trained, rel=0.5 if learns or name == "fedavg_lora" else 0.05)
        generated = found["tokens"].get("generate", 0)
        assert (generated > 0) == (load.generated > 0)
        scored = load.scored if name == "logit_exchange" else 0
        # An untrained model says anything, up to generation.max_new_tokens.
        assert generated <= load.generated * 8 + scored
        for way, foretold in (("uplink_bytes", load.uplink_bytes), ("downlink_bytes", load.downlink_bytes)):
            assert found[way].sum() == pytest.approx(foretold, rel=0.1 if weights else 2, abs=120)
    if name == "semantic_consensus":
        assert by_round.loc[(1, "load"), "downlink_bytes"] == 2 * forecast.prompt_bytes
        assert forecast.rounds[1].downlink_bytes == by_round.loc[1, "downlink_bytes"].sum()


def test_hours_are_those_of_the_worker_with_the_most_to_do(tiny_config: Make) -> None:
    config = tiny_config(algorithm={"name": "local_only"})
    forecast = Forecast(plan_experiment(config, Silent()))
    speed = Speed(trained=10.0, generated=20.0, scored=40.0, parameters=forecast.parameters[config.model.name] // 2)
    total = forecast.total
    alone = 2 * (total.trained / 10 + total.generated / 20 + total.scored / 40)
    assert forecast.seconds(speed) == pytest.approx(alone, rel=0.01)  # one after another, in one process
    assert Load(1, 2, 3, 4, 5) * 2 + Load(trained=1) == Load(2, 4, 7, 8, 10)
    found = measure(forecast)
    assert isinstance(found, Speed)
    assert min(found.trained, found.generated, found.scored) > 10


def test_a_gpu_that_is_not_there_or_an_engine_leaves_hours_unknown(tiny_config: Make) -> None:
    forecast = Forecast(plan_experiment(tiny_config(), Silent()))
    for section, update, said in (
        ("generation", {"engine": "vllm"}, "engines"),
        ("resources", {"device": "cuda"}, "no GPU"),
    ):
        changed = getattr(forecast.config, section).model_copy(update=update)
        before, forecast.config = forecast.config, forecast.config.model_copy(update={section: changed})
        assert said in str(measure(forecast))
        forecast.config = before


@pytest.fixture
def config_file(tmp_path: Path, tiny_config: Make) -> Path:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(name="tried", evaluation={"num_answers": 2})))
    return tmp_path / "config.yaml"


def test_a_dry_run_says_everything_and_leaves_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(config_file), "--dry-run", "--out", str(out), "--seed", "5"]) == 0
    text = capsys.readouterr().out
    for said in (
        "settings that differ from the defaults:\n  name: tried\n  seed: 5\n",
        "0 of 432 rows left out",
        "texts cut at model.max_length 64",
        "clients 0 to 2: 12 each; public prompts: 6; test set: 6",
        "3 clients on 1 workers",
        "base model",
        "round 2",
        "total",
        "Exact: ",
        "Time: about ",
        "tokens/s trained",
    ):
        assert said in text, text
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_many_rounds_are_told_on_average(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["run", str(config_file), "--num_rounds", "30", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "a round, on average" in text
    assert "round 2" not in text


def test_a_dry_run_of_a_comparison_or_a_sweep_has_a_row_for_each_arm_or_trial(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("seeds: [0, 1]\narms: {a: {}, alone: {algorithm: {name: local_only}}}\n")
    assert main(["compare", str(config_file), str(study), "--dry-run"]) == 0
    text = capsys.readouterr().out
    rows = [line.partition("│")[0].strip() for line in text.splitlines() if "│" in line]
    assert rows == ["a", "alone", "2 x 2 runs"]
    space = {"search": "optuna", "num_samples": 7, "space": {"prompts.budget": {"choice": [4, 5]}}}
    study.write_text(yaml.safe_dump(space))
    assert main(["sweep", str(config_file), str(study), "--dry-run"]) == 0
    assert "7 x 1 runs" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "study.yaml"]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("prompts.budget", "5000", "prompts.budget"),
        ("data.max_response_chars", "3", "raise data.max_response_chars"),
        ("model.lora.target_modules", "[nowhere]", "model.lora.target_modules"),
        ("resources.memory_limit_gib", "0.1", "resources.memory_limit_gib"),
        ("server.embedding_model", "/no/such", "/no/such"),
    ],
)
def test_what_a_run_would_refuse_a_dry_run_refuses(
    setting: str, value: str, said: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(config_file), f"--{setting}", value, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1]
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_progress_of_a_dry_run_leaves_the_plan_to_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    stages = StagesOnly([Progress()])
    stages.planned("where clients are")
    stages.stage("reading data")
    assert capsys.readouterr().err.strip() == "reading data ..."
