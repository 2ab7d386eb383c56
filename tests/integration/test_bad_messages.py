"""Runs in which one client's message is none: the client is left out by name, and the round goes on."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from msgspec import structs

from semcons_ray.config import ExperimentConfig
from semcons_ray.federation.fleet import Reply
from semcons_ray.federation.store import ClientStore
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent

MakeConfig = Callable[..., ExperimentConfig]

pytestmark = [pytest.mark.real, pytest.mark.slow]


class LostError(BaseException):
    pass


def lose(reply: Reply) -> None:
    if reply.round == 1 and reply.client_id == 2:
        raise LostError


@pytest.mark.parametrize(
    ("algorithm", "fleet"),
    [
        ("semantic_consensus", "local"),
        ("fedavg_lora", "local"),
        pytest.param("semantic_consensus", "ray", marks=pytest.mark.ray),
        pytest.param("fedavg_lora", "ray", marks=[pytest.mark.ray, pytest.mark.long]),
    ],
)
def test_a_garbled_message_costs_its_client_the_round_and_nobody_else(
    tiny_config: MakeConfig, tmp_path: Path, algorithm: str, fleet: str, request: pytest.FixtureRequest
) -> None:
    if fleet == "ray":
        request.getfixturevalue("one_cluster")
    config = tiny_config(algorithm={"name": algorithm}, resources={"fleet": fleet, "max_workers": 1})
    with pytest.raises(LostError):
        run_experiment(config, tmp_path / "run", Silent(lose))
    store = ClientStore(tmp_path / "run" / "state")
    sent = store.reply(1, 1)
    assert sent is not None
    store.save(store.load(1, before=2), structs.replace(sent, uplink=sent.uplink[:-1]))
    resume_experiment(tmp_path / "run", Silent())
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["num_answered"].tolist() == [1, 2, 3]
    assert rounds["lost"].tolist() == ["", "1", ""]
    kind = "Answers" if algorithm == "semantic_consensus" else "AdapterUpdate"
    assert rounds["failures"][1].startswith(f"client 1, round 1: {kind}: ")
    if algorithm == "semantic_consensus":
        votes = pd.read_parquet(tmp_path / "run" / "consensus" / "round_001.parquet")
        assert not votes[votes["client_id"] == 1]["answer"].any()
        assert votes[votes["client_id"] != 1]["answer"].any()
