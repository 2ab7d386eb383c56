"""Audits of runs: of models that are trained, and of clients whose leak is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import semcons_ray as sr
from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig
from semcons_ray.modeling.chat import read_formats
from semcons_ray.modeling.client_model import Pair
from semcons_ray.modeling.exported import load_base, response_nll
from semcons_ray.modeling.language_model import LanguageModel

pytestmark = [pytest.mark.slow, pytest.mark.real]

Make = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that nobody trains on."""
    path = tmp_path_factory.mktemp("texts") / "others.jsonl"
    rows = ({"prompt": f"tell of {word}", "response": f"there is no {word} here"} for word in ("hay", "oats", "rye"))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def flock(data: Path, others: Path, rate: float, **more: Any) -> dict[str, Any]:
    """Settings of three clients, of which the first leaks at a rate."""
    kind = "tests.security.leaky:Leaky"
    options = {"texts": str(others), "whole": True}
    return {
        "num_rounds": 1,
        "data": {"source": str(data), "examples_per_client": 20, "num_test": 6, **more},
        "prompts": {"budget": 6},
        "clients": {
            "num_clients": 3,
            "models": {
                "clean": {"kind": kind, "options": options},
                "leaky": {"kind": kind, "options": {**options, "rate": rate}},
            },
            "mix": {"leaky": 1, "clean": 2},
        },
        "generation": {"num_samples": 4},
        "algorithm": {"first_exchange": 1, "answer_last_round": True},
        "evaluation": {"metrics": ["rouge_l"], "num_answers": 1},
        "resources": {"fleet": "local"},
    }


def test_a_planted_leak_is_told_from_a_clean_run(
    tiny_data: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sr.run(flock(tiny_data, others, 0.3), out=tmp_path / "leaky")
    sr.run(flock(tiny_data, others, 0.0), out=tmp_path / "clean")
    assert main(["audit", str(tmp_path / "leaky"), str(tmp_path / "clean")]) == 0
    printed = capsys.readouterr().out
    leaky, clean = printed.split(str(tmp_path / "clean"))
    assert "answers: LEAK, they hold private examples of client 0 (" in leaky
    assert "answers: no leak noticed, of 3 clients" in clean
    table = pd.read_csv(tmp_path / "leaky" / "audit" / "disclosure.csv")
    assert set(table.loc[table["p_adjusted"] < 0.01, "client_id"]) == {0}
    assert (tmp_path / "leaky" / "audit" / "verdict.txt").read_text() in leaky
    assert not (tmp_path / "leaky" / "audit" / "canaries.csv").exists()
    again = sr.audit(tmp_path / "leaky")
    assert again.leaks
    pd.testing.assert_frame_equal(again.disclosure, table, check_dtype=False, rtol=1e-4)


def test_without_the_datas_source_less_is_held_out_and_that_is_said(
    tiny_data: Path, others: Path, tmp_path: Path
) -> None:
    source = tmp_path / "data.jsonl"
    source.write_bytes(tiny_data.read_bytes())
    sr.run(flock(source, others, 0.3), out=tmp_path / "run")
    whole = sr.audit(tmp_path / "run").disclosure
    source.unlink()
    said: list[str] = []
    less = sr.audit(tmp_path / "run", say=said.append).disclosure
    assert (less["num_held_out"] < whole["num_held_out"]).all()
    assert [line for line in said if line.startswith("only examples of the run itself are held out")]


def test_natural_clients_are_compared_with_what_is_their_own(others: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{owner} asks {i}", "response": f"{owner} says {i}", "client_id": owner}
        for owner in ("ann", "bob", "cid")
        for i in range(40)
    ]
    path = tmp_path / "natural.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sr.run(flock(path, others, 0.0, partition="natural"), out=tmp_path / "some")
    table = sr.audit(tmp_path / "some").disclosure
    assert (table["num_held_out"] < 20).all()  # of 40 of its own, 20 are private, and some are tests or public prompts


def test_an_unfinished_run_is_refused_in_a_line(
    tiny_data: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sr.run(flock(tiny_data, others, 0.0), out=tmp_path / "run")
    (tmp_path / "run" / "state" / "round_001.msgpack").unlink()
    assert main(["audit", str(tmp_path / "run")]) == 2
    assert "is not finished, so not all is there to audit" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["semantic_consensus", "fedavg_lora"])
def test_the_coins_of_canaries_show_in_models_and_not_in_messages(
    tiny_config: Make, tmp_path: Path, algorithm: str
) -> None:
    more = {"first_exchange": 1} if algorithm == "semantic_consensus" else {}
    config = tiny_config(
        data={"canaries": 8},
        algorithm={"name": algorithm, **more},
        training={"local_epochs": 6, "learning_rate": 1e-2},
        evaluation={"num_answers": 1},
    )
    run = sr.run(config, out=tmp_path / "run")
    canaries = pd.read_parquet(tmp_path / "run" / "canaries.parquet")
    private = pd.read_parquet(tmp_path / "run" / "data.parquet").query("role == 'private'")
    assert canaries["prompt"].isin(private["prompt"]).tolist() == canaries["inserted"].tolist()
    found = sr.audit(run.path)
    by_place = found.canaries.set_index(["place", "kind"])
    own = "shared model" if algorithm == "fedavg_lora" else "own model"
    assert by_place.loc[(own, "out of distribution"), "auc"] > 0.75
    if algorithm == "fedavg_lora":
        assert found.disclosure.empty
        assert found.mixes.empty
        assert {place for place, _ in by_place.index} == {"shared model"}
    else:
        places = {"answers", "pseudo-labels", "own model", "other clients' models"}
        assert {place for place, _ in by_place.index} == places
        assert set(found.disclosure["num_trained"]) == {12}  # canaries are no private examples


def test_likelihoods_of_exported_models_are_those_of_training(tiny_config: Make, tiny_llama: Path) -> None:
    config = tiny_config()
    pairs = [("add one and two", "it is 3"), ("spell two", "t w o")]
    model = LanguageModel.of(config.model, str(tiny_llama), device="cpu")
    score = model.negative_log_likelihood(model.fresh_adapter(), [Pair(*pair) for pair in pairs], 2)
    chat = read_formats({"m": tiny_llama}, max_length=64)["m"]
    found = response_nll(load_base(str(tiny_llama), dtype="float32", device="cpu"), chat, pairs)
    np.testing.assert_allclose(found, np.divide(score.nll, score.num_tokens), rtol=1e-5)
    assert torch.is_grad_enabled()
