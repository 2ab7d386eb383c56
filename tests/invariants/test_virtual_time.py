"""A run in virtual time: who is heard goes by the virtual clock, and so does not depend on where clients compute."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent, StoppedError, assert_same_run, replace_table
from tests.invariants.test_equality import four_cores  # noqa: F401  (a fixture)

FEDERATION = {
    "devices": {"fast": 3, "slow": 1},
    "own_devices": {
        name: {
            "peak_tflops": flops, "memory_gb": 8, "memory_bandwidth_gb_s": 100, "idle_watts": 5, "busy_watts": 50,
            "training_utilization": 0.5, "generation_utilization": 0.5,
        }
        for name, flops in (("fast", 1.0), ("slow", 1e-6))
    },
    "links": {"dsl": 1},
}  # fmt: skip


def config_with(tiny_config: Any, **sections: Any) -> ExperimentConfig:
    return tiny_config(**{"num_rounds": 4, "clients": {"num_clients": 4}, **sections})


def run(config: ExperimentConfig, out: Path, **resources: object) -> Path:
    changed = {**config.model_dump(), "resources": {**config.resources.model_dump(), **resources}}
    run_experiment(validate_config(changed, where="test"), out, Silent())
    return out


def rounds(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "rounds.parquet").set_index("round")


@pytest.mark.parametrize("algorithm", ["semantic_consensus", "fedavg_lora"])
def test_a_clock_that_waits_for_all_changes_nothing(tiny_config: Any, tmp_path: Path, algorithm: str) -> None:
    plain = config_with(tiny_config, algorithm={"name": algorithm})
    timed = config_with(tiny_config, algorithm={"name": algorithm}, federation=FEDERATION)
    run(plain, tmp_path / "plain", fleet="local")
    run(timed, tmp_path / "timed", fleet="local")
    virtual = rounds(tmp_path / "timed")["virtual_seconds"]
    assert virtual[0] == 0
    assert virtual.is_monotonic_increasing
    for name in ("plain", "timed"):
        table = pd.read_parquet(tmp_path / name / "rounds.parquet").drop(columns="virtual_seconds")
        replace_table(tmp_path / name / "rounds.parquet", table)
    assert_same_run(tmp_path / "plain", tmp_path / "timed")


DEADLINE = {"policy": "deadline", "policy_options": {"hours": 0.001}}
SEMI_ASYNC = {"policy": "semi_async", "policy_options": {"buffer_size": 2}}
BOTH = pytest.mark.parametrize("algorithm", ["semantic_consensus", "fedavg_lora"])


def straggling(tiny_config: Any, algorithm: str, policy: dict[str, Any]) -> ExperimentConfig:
    return config_with(
        tiny_config,
        algorithm={"name": algorithm} | ({"first_exchange": 1} if algorithm == "semantic_consensus" else {}),
        federation=FEDERATION | policy,
        failures={"quorum": 0.25},
        evaluation={"every": 1, "num_answers": 0},
        num_rounds=6,
    )


@BOTH
def test_who_is_late_has_no_vote(tiny_config: Any, tmp_path: Path, algorithm: str) -> None:
    out = run(straggling(tiny_config, algorithm, DEADLINE), tmp_path / "run", fleet="local")
    table = rounds(out).loc[1:]
    (slow,) = {lost for lost in table["lost"] if lost}
    assert table["lost"].tolist()[0] == slow
    assert "its answers were not there in time" in table["failures"][1]
    assert table["num_participants"][1] == 4
    assert table["num_participants"][2] == 3  # it is still at work
    assert set(table["num_answered"]) == {3}
    ledger = pd.read_parquet(out / "ledger.parquet")
    learnt = ledger.query("stage == 'fine_tune'").groupby("round")["client_id"].nunique()
    assert learnt.tolist() == table["num_participants"].tolist()  # its work is in the ledger
    metrics = pd.read_parquet(out / "metrics.parquet").groupby("round")["client_id"].count()
    asked = table["num_participants"] if algorithm == "semantic_consensus" else pd.Series(4, index=table.index)
    assert metrics[1:].tolist() == asked.tolist()
    if algorithm == "semantic_consensus":
        votes = pd.read_parquet(out / "consensus" / "round_001.parquet")
        assert set(votes.loc[votes["answer"] == "", "client_id"]) >= {int(slow)}
        assert not votes.loc[votes["client_id"] == int(slow), "answer"].any()


@BOTH
def test_who_is_late_is_heard_in_a_later_round(tiny_config: Any, tmp_path: Path, algorithm: str) -> None:
    out = run(straggling(tiny_config, algorithm, SEMI_ASYNC), tmp_path / "run", fleet="local")
    table = rounds(out).loc[1:]
    assert set(table["lost"]) == {""}
    assert (table["num_answered"] >= 2).all()
    assert table["num_answered"][1] == 2
    assert (table["num_participants"][1:] <= 3).all()
    metrics = pd.read_parquet(out / "metrics.parquet").groupby("round")["client_id"].count()
    assert set(metrics) == {4}  # everybody is measured in each round
    ledger = pd.read_parquet(out / "ledger.parquet").query("stage == 'fine_tune'")
    assert not ledger.duplicated(["round", "client_id"]).any()
    assert ledger.groupby("round").size().equals(table["num_participants"].rename_axis("round").astype("int64"))


def test_a_client_that_computes_elsewhere_has_a_link_and_no_device_at_work(
    tiny_config: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    mine = {"parrot": {"kind": "tests.parrots:Listening"}}
    clients = {"num_clients": 4, "mix": {str(tiny_llama): 3, "parrot": 1}, "models": mine}
    config = config_with(tiny_config, clients=clients, algorithm={"first_exchange": 1}, federation=FEDERATION)
    out = run(config, tmp_path / "run", fleet="local")
    done = sr.replay(out)
    assert done.totals["hours"].iloc[0] * 3600 == pytest.approx(rounds(out)["virtual_seconds"].iloc[-1])
    sums = done.visits.groupby("client_id")[["fine_tune_seconds", "generate_seconds", "uplink_seconds"]].sum()
    (elsewhere,) = sums.index[sums["fine_tune_seconds"] == 0]
    assert sums.loc[elsewhere, "generate_seconds"] == 0
    assert sums.loc[elsewhere, "uplink_seconds"] > 0
    assert (sums.drop(elsewhere)[["fine_tune_seconds", "generate_seconds"]] > 0).all(axis=None)


class StopsAfter(Silent):
    """Stops a run when a round is committed."""

    def __init__(self, round: int) -> None:
        super().__init__()
        self._round = round

    def round_ends(self, commit: Any) -> None:
        if commit.summary.round == self._round:
            raise StoppedError


@BOTH
@pytest.mark.parametrize("policy", [DEADLINE, SEMI_ASYNC], ids=["deadline", "semi_async"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    tiny_config: Any, tmp_path: Path, policy: dict[str, Any], algorithm: str
) -> None:
    config = straggling(tiny_config, algorithm, policy)
    config = validate_config({**config.model_dump(), "resources": {"fleet": "local", "device": "cpu"}}, where="test")
    run_experiment(config, tmp_path / "whole", Silent())
    for round in (1, 3):
        with pytest.raises(StoppedError):
            run_experiment(config, tmp_path / f"stopped-{round}", StopsAfter(round))
        resume_experiment(tmp_path / f"stopped-{round}", Silent())
        assert_same_run(tmp_path / "whole", tmp_path / f"stopped-{round}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("policy", [DEADLINE, SEMI_ASYNC], ids=["deadline", "semi_async"])
def test_every_fleet_and_packing_hears_the_same(tiny_config: Any, tmp_path: Path, policy: dict[str, Any]) -> None:
    config = straggling(tiny_config, "semantic_consensus", policy)
    run(config, tmp_path / "local", fleet="local")
    for most in (4, 2):
        run(config, tmp_path / str(most), fleet="ray", max_workers=most)
        assert_same_run(tmp_path / "local", tmp_path / str(most))
