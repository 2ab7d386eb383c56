"""Replays of runs in a federation, against the runs' own virtual time and against each other."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig, FederationConfig
from semcons_ray.errors import ConfigError, RunFolderError
from semcons_ray.reporting.replay import CALCULATED, MEASURED, SCALED, Recorded, replay
from tests.invariants.test_virtual_time import DEADLINE, FEDERATION, SEMI_ASYNC, run, straggling

SLOW_LINK = {"own_links": {"narrow": {"up_mbit": 0.1, "down_mbit": 0.1, "latency_ms": 5}}, "links": {"narrow": 1}}


def federation(**settings: Any) -> FederationConfig:
    return FederationConfig(**{**FEDERATION, **settings})


@pytest.mark.parametrize("policy", [{}, DEADLINE, SEMI_ASYNC], ids=["synchronous", "deadline", "semi_async"])
@pytest.mark.parametrize("algorithm", ["semantic_consensus", "fedavg_lora"])
def test_a_replay_in_the_runs_own_federation_takes_its_own_virtual_time(
    tiny_config: Any, tmp_path: Path, policy: dict[str, Any], algorithm: str
) -> None:
    config: ExperimentConfig = straggling(tiny_config, algorithm, policy)
    out = run(config, tmp_path / "run", fleet="local")
    again = replay(Recorded.read(out), config.federation)
    rounds = pd.read_parquet(out / "rounds.parquet").query("round > 0")
    assert (again.rounds["hours"] * 3600).tolist() == pytest.approx(rounds["virtual_seconds"].tolist(), rel=1e-12)
    assert again.rounds["num_asked"].tolist() == rounds["num_participants"].tolist()
    assert again.rounds["num_heard"].tolist() == rounds["num_answered"].tolist()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: Any, tiny_config: Any) -> dict[str, Recorded]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: Recorded.read(run(straggling(tiny_config, name, {}), folder / name, fleet="local"))
        for name in ("semantic_consensus", "fedavg_lora", "local_only")
    }


def test_a_model_of_another_size_makes_weights_larger_and_texts_not(recorded: dict[str, Recorded]) -> None:
    big = {**FEDERATION["own_devices"]["fast"], "memory_gb": 400}
    here = federation(own_devices={"fast": big, "slow": big})
    own = {name: replay(one, here) for name, one in recorded.items()}
    scaled = {name: replay(one, here, model="llama-3.1-8b") for name, one in recorded.items()}
    text, weights = "semantic_consensus", "fedavg_lora"
    assert scaled[text].rounds["bytes"].tolist() == own[text].rounds["bytes"].tolist()
    assert scaled[text].sources["uplink_bytes"] == MEASURED
    ratio = scaled[weights].totals["bytes"] / own[weights].totals["bytes"]
    # 20,971,520 weights at rank 8 in all linear maps of Llama 3.1 8B: 2,621,440 for each unit of rank.
    assert recorded[weights].adapter * ratio == pytest.approx(2_621_440, rel=0.01)
    assert scaled[weights].sources["uplink_bytes"] == SCALED
    larger = 8_029_995_008 / recorded[text].models[next(iter(recorded[text].models))].parameters
    for name in (text, "local_only"):
        seconds = [one[name].visits["fine_tune_seconds"].sum() for one in (own, scaled)]
        assert seconds[1] / seconds[0] == pytest.approx(larger, rel=1e-3)


def test_a_slower_link_costs_weights_more_than_texts(recorded: dict[str, Recorded]) -> None:
    hours = {
        name: [replay(one, federation(**link)).totals["hours"] for link in ({}, SLOW_LINK)]
        for name, one in recorded.items()
    }
    lost = {name: slow - fast for name, (fast, slow) in hours.items()}
    assert lost["local_only"] == pytest.approx(0, abs=1e-4)  # but for latency
    assert lost["fedavg_lora"] > lost["semantic_consensus"] > 0


def test_joules_by_hand(recorded: dict[str, Recorded]) -> None:
    done = replay(recorded["local_only"], federation(links={"4g": 1}, devices={"fast": 1}, region="sweden"))
    busy = done.visits["fine_tune_seconds"].sum()
    assert done.totals["compute_joules"] == pytest.approx(50 * busy)
    assert done.totals["radio_joules"] == 0  # nothing is sent
    waits = done.rounds["seconds"].sum() * 4 - busy
    assert done.totals["idle_joules"] == pytest.approx(5 * waits, rel=1e-6)
    sent = replay(recorded["fedavg_lora"], federation(links={"4g": 1}))
    radio = (sent.visits["uplink_bytes"].sum() * 1.33 + sent.visits["downlink_bytes"].sum() * 0.26) / 1e6
    assert sent.totals["radio_joules"] == pytest.approx(radio)
    swedish, polish = (
        replay(recorded["fedavg_lora"], federation(region=name)).totals for name in ("sweden", "poland")
    )
    assert swedish["joules"] == polish["joules"]
    assert swedish["grams_co2"] < polish["grams_co2"] / 5
    parts = ("compute_joules", "radio_joules", "idle_joules", "server_joules")
    assert sent.totals["joules"] == pytest.approx(sum(sent.totals[part] for part in parts))


def test_who_waited_for_whom(recorded: dict[str, Recorded]) -> None:
    done = replay(recorded["semantic_consensus"], federation())
    slow = done.visits.loc[done.visits["device"] == "slow", "client_id"].unique()
    assert set(done.rounds["last_client"]) == set(slow)
    assert set(done.rounds["last_device"]) == {"slow"}
    assert (done.rounds["waited_for_last_seconds"] > 0).all()


def test_every_column_says_where_it_is_from(recorded: dict[str, Recorded]) -> None:
    done = replay(recorded["semantic_consensus"], federation())
    marked = done.marked(done.rounds).columns
    assert f"loss [{MEASURED}]" in marked
    assert f"hours [{CALCULATED}]" in marked
    assert all(name.endswith("]") for name in marked)
    lowest = done.rounds["loss"].min()
    first = done.rounds.loc[done.rounds["loss"].idxmin(), "hours"]
    assert done.hours_to(lowest) <= first
    assert pd.isna(done.hours_to(lowest - 1))


def test_what_cannot_be_replayed_is_refused_in_a_line(recorded: dict[str, Recorded], tmp_path: Path) -> None:
    run = recorded["semantic_consensus"]
    for settings, said in (
        ({"devices": {}}, "federation.devices is empty"),
        ({"devices": {"h100x": 1}}, "federation.devices: there is no device h100x"),
        ({"links": {"dls": 1}}, "did you mean dsl"),
        ({"region": "atlantis"}, "federation.region"),
        ({"model": "llama-9"}, "federation.model"),
        ({"model": "llama-3.1-405b"}, "memory"),
        ({"own_devices": {"fast": {"peak_tflops": -1}, "slow": {}}}, "federation.own_devices.fast"),
        ({"availability": "trace", "availability_options": {"path": str(tmp_path / "no.csv")}}, "No such file"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            replay(run, federation(**settings))
        assert "\n" not in str(error.value)
    with pytest.raises(RunFolderError):
        Recorded.read(tmp_path)
