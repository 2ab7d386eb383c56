"""Runs in which clients have test sets of their own: what is measured on them, and that it changes nothing else."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from semcons_ray.config import ExperimentConfig
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.reporting import write_report
from semcons_ray.runs.experiment import plan_experiment, run_experiment
from semcons_ray.runs.forecast import Forecast
from tests.invariants.runs import Silent, assert_same_run, replace_table
from tests.tiny import examples

pytestmark = [pytest.mark.slow, pytest.mark.real]

Make = Callable[..., ExperimentConfig]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "semantic_consensus": {"algorithm": {"first_exchange": 1}},
    "centralized": {"algorithm": {"name": "centralized"}},
    "fedavg_lora": {"algorithm": {"name": "fedavg_lora", "weight_dtype": "float32"}},
    "flora": {"algorithm": {"name": "flora", "weight_dtype": "float32"}},
    "fedsa_lora": {"algorithm": {"name": "fedsa_lora", "weight_dtype": "float32"}},
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A file of 10 questions for each of three clients, and others for everyone."""
    rows = examples()
    folder = tmp_path / "clients"
    folder.mkdir()
    for client, name in enumerate(("ann", "bob", "cem")):
        lines = [json.dumps(row) + "\n" for row in rows[100 + 10 * client : 110 + 10 * client]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, part in (("test", rows[:6]), ("prompts", rows[200:206])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def data(files: Path, **more: Any) -> dict[str, Any]:
    source = {"source": str(files / "clients/*.jsonl"), "partition": "natural", "num_test": 6}
    return {"data": source | {"test_source": str(files / "test.jsonl")} | more,
            "prompts": {"source": str(files / "prompts.jsonl")}}  # fmt: skip


def own_columns(run: Path) -> list[str]:
    return [name for name in pd.read_parquet(run / "metrics.parquet") if name.startswith("own_")]


def loss(config: ExperimentConfig, adapter: Path | None, shown: pd.DataFrame) -> float:
    """Nats a token by a model that is made anew, without the run."""
    model = LanguageModel.of(config.model, config.model.name, device="cpu", trainings=[])
    tensors = model.fresh_adapter()
    if adapter:
        read = load_file(adapter / "adapter_model.safetensors")
        tensors = {key: read[key.replace(".default", "")] for key in tensors}
    pairs = [Pair(prompt, response) for prompt, response in zip(shown["prompt"], shown["response"], strict=True)]
    score = model.negative_log_likelihood(tensors, pairs, 4)
    return score.nll_sum / sum(score.num_tokens)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_clients_model_is_measured_on_its_own_test_set_and_nothing_else_changes(
    name: str, tmp_path: Path, files: Path, tiny_config: Make
) -> None:
    common = ALGORITHMS[name] | {"evaluation": {"num_answers": 0, "every": 1}}
    with_own = tiny_config(**common, **data(files, examples_per_client=8, client_test_fraction=0.25))
    without = tiny_config(**common, **data(files, examples_per_client=6))
    forecast = Forecast(plan_experiment(with_own, Silent()))
    run, plain = tmp_path / "own", tmp_path / "plain"
    run_experiment(with_own, run, Silent())
    run_experiment(without, plain, Silent())
    assert own_columns(plain) == []
    assert own_columns(run) == ["own_nll", "own_bits_per_byte"]

    metrics, split = pd.read_parquet(run / "metrics.parquet"), pd.read_parquet(run / "data.parquet")
    own = split[split["role"] == "client_test"]
    assert own["client_id"].tolist() == [0, 0, 1, 1, 2, 2]
    assert not set(own["prompt"]) & set(split.loc[split["role"] != "client_test", "prompt"])
    assert np.isfinite(metrics["own_nll"]).all()
    for client, shown in own.groupby("client_id"):
        of_client = metrics[metrics["client_id"] == client].set_index("round")
        assert of_client.loc[0, "own_nll"] == pytest.approx(loss(with_own, None, shown), rel=1e-5)
        if name != "flora":  # its adapters are of a higher rank
            adapter = run / "adapters" / f"client_{0 if name == 'centralized' else client:03d}"
            assert of_client.loc[2, "own_nll"] == pytest.approx(loss(with_own, adapter, shown), rel=1e-4)
            assert of_client.loc[2, "own_nll"] != of_client.loc[0, "own_nll"]
        num_bytes = sum(len(text.encode()) for text in shown["response"])
        bits = of_client.loc[0, "own_bits_per_byte"] * num_bytes * math.log(2) / of_client.loc[0, "own_nll"]
        assert bits == pytest.approx(round(bits), abs=1e-6)  # the number of tokens

    ledger, before = (pd.read_parquet(folder / "ledger.parquet") for folder in (run, plain))
    scored = ledger[ledger["stage"] == "evaluate"].groupby("round")["tokens"].sum()
    assert scored.tolist() == pytest.approx([load.scored for load in forecast.rounds], rel=0.02)

    assert "on its own test set" in write_report(run).read_text(encoding="utf-8")
    assert "on its own test set" not in write_report(plain).read_text(encoding="utf-8")
    # But for these columns and the work of measuring them, both runs are the same to the last bit.
    replace_table(run / "metrics.parquet", metrics.drop(columns=own_columns(run)))
    for folder, table in ((run, ledger), (plain, before)):
        replace_table(folder / "ledger.parquet", table[table["stage"] != "evaluate"])
    assert_same_run(run, plain)


def test_what_is_held_out_is_told(tmp_path: Path, files: Path, tiny_config: Make) -> None:
    own = data(files, examples_per_client=8, client_test_fraction=0.25)
    config = tiny_config(algorithm={"name": "local_only"}, **own)
    plan = plan_experiment(config, Silent())
    told = "clients: 0 of 18 examples left out of training; by design 6 in own test sets of 3 of 3 clients"
    assert told in [str(tally) for tally in plan.tallies]
