"""Whole experiments on tiny models, in this process: what is in the folder, and whether it adds up."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import yaml
from peft import AutoPeftModelForCausalLM

from semcons_ray.config import ExperimentConfig, LoraConfig
from semcons_ray.messages import Answers, PseudoLabels, PublicPrompts
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.reporting import read_run, render_result, write_report
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent

pytestmark = [pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]


def once(fixture_name: str, config: pytest.Config) -> Literal["function", "module"]:
    """Mutation testing knows what a test passes through, but not what a fixture of its module did before."""
    return "function" if "MUTANT_UNDER_TEST" in os.environ else "module"


@pytest.fixture(scope=once)
def run(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds of three clients, with settings that the defaults don't try."""
    out = tmp_path_factory.mktemp("run") / "out"
    config = tiny_config(
        num_rounds=3,
        data={"partition": "category"},
        prompts={"selection": "k_center"},
        algorithm={"agreement_threshold": 0.5, "rule": "plurality", "first_exchange": 1},
        evaluation={"every": 2},
    )
    run_experiment(config, out, Silent())
    return out


def test_a_run_folder_holds_what_it_should(run: Path) -> None:
    write_report(run)
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "placement.json", "data.parquet", "data_report.json", "ledger.parquet"),
        *("metrics.parquet", "rounds.parquet", "consensus", "adapters", "state", "report.html"),
    }
    answered = [path.name for path in sorted((run / "consensus").iterdir())]
    assert answered == ["round_001.parquet", "round_002.parquet"]  # nobody would learn the last round's labels
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["resources"]["device"] == "cpu"
    assert resolved["model"]["dtype"] == "float32"


def test_metrics_are_there_for_the_base_model_and_each_evaluated_round(run: Path) -> None:
    metrics = pd.read_parquet(run / "metrics.parquet")
    assert sorted(set(zip(metrics["round"], metrics["client_id"], strict=True))) == [
        (round, client) for round in (0, 2, 3) for client in range(3)
    ]
    base = metrics[metrics["round"] == 0]
    assert base["nll"].nunique() == 1
    assert metrics["perplexity"].tolist() == pytest.approx([math.exp(nll) for nll in metrics["nll"]])


def test_bits_per_byte_are_the_same_likelihood_over_bytes(run: Path) -> None:
    metrics = pd.read_parquet(run / "metrics.parquet")
    assert (metrics["bits_per_byte"] / metrics["nll"]).nunique() < 4  # one factor, but for rounding
    data = pd.read_parquet(run / "data.parquet")
    responses = data.loc[data["role"] == "test", "response"]
    model = LanguageModel(
        read_run(run).config["model"]["name"], lora=LoraConfig(), dtype="float32", device="cpu", max_length=64
    )
    tokens = sum(len(model.tokenizer(text)["input_ids"]) + 1 for text in responses)
    num_bytes = sum(len(text.encode()) for text in responses)
    base = metrics[metrics["round"] == 0].iloc[0]
    assert base["bits_per_byte"] == pytest.approx(base["nll"] * tokens / math.log(2) / num_bytes, rel=1e-6)


def test_bytes_are_those_of_the_messages(run: Path) -> None:
    data = pd.read_parquet(run / "data.parquet")
    ledger = pd.read_parquet(run / "ledger.parquet")
    num_private = data[data["role"] == "private"].groupby("client_id").size()
    prompts = data.loc[data["role"] == "public", "prompt"]
    downlink = len(PseudoLabels(round_number=0, prompt_ids=(), responses=()).encode("zstd"))
    for round in (1, 2):
        votes = pd.read_parquet(run / "consensus" / f"round_{round:03d}.parquet")
        rows = ledger[ledger["round"] == round].set_index(["stage", "client_id"])
        for client, answers in votes.sort_values("prompt_id").groupby("client_id")["answer"]:
            message = Answers(
                round_number=round, client_id=client, num_examples=int(num_private[client]), answers=tuple(answers)
            )
            assert rows.loc[("generate", client), "uplink_bytes"] == len(message.encode("zstd"))
            assert rows.loc[("fine_tune", client), "downlink_bytes"] == downlink
        chosen = votes[votes["chosen"]].sort_values("prompt_id")
        labels = PseudoLabels(
            round_number=round, prompt_ids=tuple(chosen["prompt_id"]), responses=tuple(chosen["answer"])
        )
        downlink = len(labels.encode("zstd"))
    last = ledger[ledger["round"] == 3].groupby("stage")[["uplink_bytes", "downlink_bytes"]].sum()
    assert last.loc["fine_tune", "downlink_bytes"] == 3 * downlink
    assert last["uplink_bytes"].sum() == 0
    sent = ledger[ledger["downlink_bytes"].gt(0) & (ledger["stage"] == "load")].set_index(["round", "client_id"])
    once = len(PublicPrompts(prompts=tuple(prompts)).encode("zstd"))
    assert sent["downlink_bytes"].to_dict() == {(1, client): once for client in range(3)}


def test_votes_add_up(run: Path) -> None:
    rounds = pd.read_parquet(run / "rounds.parquet").set_index("round")
    for round in (1, 2):
        votes = pd.read_parquet(run / "consensus" / f"round_{round:03d}.parquet")
        per_prompt = votes.groupby("prompt_id")
        assert (per_prompt["chosen"].sum() == (~per_prompt["abstained"].first()).astype(int)).all()
        assert (per_prompt["abstained"].first() == ~(per_prompt["agreement"].first() >= 0.5 - 1e-6)).all()
        assert rounds.loc[round, "num_labels"] == votes["chosen"].sum()
        assert rounds.loc[round, "mean_agreement"] == pytest.approx(per_prompt["agreement"].first().mean(), rel=1e-6)


def test_private_public_and_test_data_never_overlap(run: Path) -> None:
    data = pd.read_parquet(run / "data.parquet")
    assert data["prompt"].is_unique
    assert data.groupby("role").size().to_dict() == {"private": 36, "public": 6, "test": 6}


def test_pseudo_labels_are_trained_on_from_the_second_round(run: Path) -> None:
    metrics = pd.read_parquet(run / "metrics.parquet").set_index(["round", "client_id"])
    labels = pd.read_parquet(run / "rounds.parquet").set_index("round")["num_labels"]
    assert metrics.loc[(2, 0), "num_pseudo_labels"] == labels[1]
    assert metrics.loc[(3, 0), "num_pseudo_labels"] == labels[2]


def test_adapters_load_in_plain_peft(run: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(run / "adapters" / "client_002")
    assert any("lora_B" in name and bool(value.any()) for name, value in model.named_parameters())


def test_every_joule_and_second_has_a_source(run: Path) -> None:
    ledger = pd.read_parquet(run / "ledger.parquet")
    assert set(ledger["energy_source"]) <= {"measured", "estimated"}
    assert (ledger["energy_joules"] >= 0).all()
    assert set(ledger["stage"]) == {"load", "fine_tune", "generate", "embed", "consensus", "evaluate", "idle"}
    for _, rows in ledger[ledger["round"] > 0].groupby(["round", "worker"]):
        busy = rows[rows["stage"] != "idle"].sort_values("started_at")
        ends = busy["started_at"] + busy["duration_seconds"]
        assert (
            busy["started_at"].to_numpy()[1:] >= ends.to_numpy()[:-1] - 0.05
        ).all()  # a worker does one thing at once


def test_the_result_names_every_client(run: Path) -> None:
    text = render_result(read_run(run), width=120)
    assert "3 of 3 rounds" in text
    assert "on the wire" in text


def test_local_only_sends_nothing(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_experiment(tiny_config(algorithm={"name": "local_only"}), tmp_path / "out", Silent())
    ledger = pd.read_parquet(tmp_path / "out" / "ledger.parquet")
    assert ledger[["uplink_bytes", "downlink_bytes"]].to_numpy().sum() == 0
    assert not (tmp_path / "out" / "consensus").exists()
    assert write_report(tmp_path / "out").stat().st_size > 0
