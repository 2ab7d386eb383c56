"""Measuring changes nothing, and a client's name is only a name: bit for bit, for every algorithm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.split import DataSplit, read_split, write_split
from semcons_ray.federation import adapter_model, client, randomness
from semcons_ray.federation.store import ClientStore
from semcons_ray.parts import BUILT_IN
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.run_folder import RunFolder
from tests.invariants.runs import Silent

MakeConfig = Callable[..., ExperimentConfig]

ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in BUILT_IN["algorithm"]},
    "plurality": {"rule": "plurality"},
    "weighted medoid": {"rule": "weighted_medoid"},
    "random client": {"rule": "random_client"},
    "self-training": {"rule": "own_answer"},
    "own labels": {"name": "scaffold", "self_labels": True},
}


SETTINGS = [*ALGORITHMS, "parrots"]


def settings_of(name: str, tiny_llama: Path) -> dict[str, Any]:
    """Settings with an algorithm; or with clients, the last two of four, whose models are none of this project's."""
    if name != "parrots":
        return {"algorithm": ALGORITHMS[name], "clients": {"num_clients": 4}}
    models = {"polly": {"kind": "tests.parrots:Parrot"}}
    return {
        "algorithm": {"first_exchange": 1},
        "clients": {"num_clients": 4, "mix": {str(tiny_llama): 2, "polly": 2}, "models": models},
    }


def adapters(out: Path) -> dict[int, bytes]:
    """Exported adapters by client."""
    files = sorted(out.glob("adapters/*/adapter_model.safetensors"))
    assert files
    return {int(path.parent.name[-3:]): path.read_bytes() for path in files}


def votes(out: Path) -> pd.DataFrame:
    """All answers and what became of them, by round, prompt and client."""
    tables = [pd.read_parquet(path).assign(round=path.stem) for path in sorted(out.glob("consensus/*.parquet"))]
    keys = ["round", "prompt_id", "client_id"]
    return pd.concat(tables).set_index(keys).sort_index() if tables else pd.DataFrame()


@pytest.mark.parametrize("name", SETTINGS)
def test_who_is_measured_and_how_often_changes_no_result(
    tiny_config: MakeConfig, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = settings_of(name, tiny_llama)
    every, seldom = ({"every": 1, "num_answers": 3}, {"every": 3, "num_answers": 0})
    run_experiment(tiny_config(num_rounds=3, evaluation=seldom, **settings), tmp_path / "seldom", Silent())
    run_experiment(tiny_config(num_rounds=3, evaluation=every, **settings), tmp_path / "often", Silent())
    # Another client than the first measures the base model.
    monkeypatch.setattr("semcons_ray.runs.experiment.reversed", lambda clients: clients, raising=False)
    run_experiment(tiny_config(num_rounds=3, evaluation=every, **settings), tmp_path / "last", Silent())
    for other in ("often", "last"):
        assert adapters(tmp_path / other) == adapters(tmp_path / "seldom")
        pd.testing.assert_frame_equal(votes(tmp_path / other), votes(tmp_path / "seldom"), check_exact=True)


def test_the_base_model_is_measured_without_a_visit(tiny_config: MakeConfig, tmp_path: Path) -> None:
    visits: list[int] = []

    def look(reply: Any) -> None:
        if reply.round == 0:
            visits.append(reply.client_id)
            assert ClientStore(tmp_path / "run" / "state").load(reply.client_id, before=1) == {}

    run_experiment(tiny_config(), tmp_path / "run", Silent(look))
    assert visits == [0]


@pytest.mark.parametrize("name", SETTINGS)
def test_renaming_clients_renames_results(
    tiny_config: MakeConfig, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Client i of the second run has the data and the random numbers of client `was[i]` of the first."""
    config = tiny_config(num_rounds=3, data={"partition": "quantity"}, **settings_of(name, tiny_llama))
    run_experiment(config, tmp_path / "run", Silent())
    was = [1, 0, 3, 2] if name == "parrots" else [2, 0, 3, 1]  # each keeps its model
    split = read_split(tmp_path / "run" / "data.parquet")
    renamed = RunFolder.create(tmp_path / "renamed", config)
    shares = tuple(split.private[old] for old in was)
    write_split(DataSplit(private=shares, public=split.public, test=split.test), renamed.data)
    stream = randomness.stream
    if config.algorithm.name != "centralized":  # whose one client is nobody's

        def moved(seed: int, round: int, client_id: int, stage: Any) -> np.random.Generator:
            return stream(seed, round, was[client_id] if client_id >= 0 else client_id, stage)

        monkeypatch.setattr(randomness, "stream", moved)
        monkeypatch.setattr(client, "stream", moved)
        monkeypatch.setattr(adapter_model, "stream", moved)
    resume_experiment(renamed.path, Silent())
    before, after = adapters(tmp_path / "run"), adapters(renamed.path)
    if config.algorithm.name == "centralized":
        assert before == after
        return
    assert after == {new: before[old] for new, old in enumerate(was) if old in before}
    table = votes(renamed.path)
    if len(table):
        table = table.rename(index=dict(enumerate(was)), level="client_id").sort_index()
        pd.testing.assert_frame_equal(table, votes(tmp_path / "run"), check_exact=True)
    for metric in ("nll", "rouge_l", "train_loss"):
        values = [
            pd.read_parquet(out / "metrics.parquet").set_index(["round", "client_id"])[metric].sort_index()
            for out in (tmp_path / "run", renamed.path)
        ]
        moved_back = values[1].rename(index=dict(enumerate(was)), level="client_id").sort_index()
        pd.testing.assert_series_equal(values[0], moved_back, check_exact=True)
