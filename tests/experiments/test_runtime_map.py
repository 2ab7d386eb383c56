"""The break-even of semantic consensus and averaging, on ledgers with numbers that are easy to reckon with."""

import pandas as pd
import pytest

from semcons_ray.config import validate_config
from semcons_ray.reporting.replay import Recorded, replay
from semcons_ray.timeline.devices import Model
from tests.experiments.scripts import load_script

script = load_script("runtime", "run.py")


def recorded(algorithm: str, rows: list[dict[str, object]]) -> Recorded:
    config = validate_config(
        {"num_rounds": 2, "clients": {"num_clients": 2}, "algorithm": {"name": algorithm}}, where="test"
    )
    every = [{"tokens": 0, "uplink_bytes": 0, "downlink_bytes": 0, **row} for row in rows]
    who = [{"round": round, "client_id": client} for round in (1, 2) for client in (0, 1)]
    ledger = pd.DataFrame([{**row, **one} for row in every for one in who])
    return Recorded(
        config=config,
        models={config.model.name: Model(parameters=134_515_008, layers=30)},
        ledger=ledger,
        prompt_tokens=0,
        example_tokens=50.0,
        adapter=305_280.0,
        losses=pd.Series({1: 2.0, 2: 1.0}),
        num_rounds=2,
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Recorded]]:
    text = [
        {"stage": "fine_tune", "tokens": 3000, "downlink_bytes": 1000},
        {"stage": "generate", "tokens": 500, "uplink_bytes": 1000},
    ]
    weights = [
        {"stage": "fine_tune", "tokens": 1000, "downlink_bytes": 5_000_000},
        {"stage": "encode", "uplink_bytes": 5_000_000},
    ]
    return {"consensus": [recorded("semantic_consensus", text)], "FedAvg-LoRA": [recorded("fedavg_lora", weights)]}


@pytest.mark.parametrize("model", [None, "llama-3.1-8b"])
def test_at_the_break_even_both_take_as_long_and_below_it_consensus_less(
    runs: dict[str, list[Recorded]], model: str | None
) -> None:
    def ratio(mbit: float) -> float:
        own = {"line": {"up_mbit": mbit, "down_mbit": mbit, "latency_ms": 10}}
        imagined = script.federation(model, "line", own_links=own)
        hours = [replay(runs[arm][0], imagined).totals["hours"] for arm in ("consensus", "FedAvg-LoRA")]
        return float(hours[0] / hours[1])

    found = script.break_even_mbit(runs, model, "hours")
    assert ratio(found) == pytest.approx(1, abs=0.02)
    assert ratio(found / 3) < 1 < ratio(found * 3)


def test_a_larger_model_has_larger_weights_but_more_to_compute(runs: dict[str, list[Recorded]]) -> None:
    table = script.break_even_map(runs).set_index(["model", "link"])
    assert table.loc[("llama-3.1-8b", "4g"), "hours, ratio"] < table.loc[("llama-3.1-8b", "fibre"), "hours, ratio"]
    assert len(table) == len(script.MODELS) * len(script.LINKS)
    assert (table["hours, ratio"] > 0).all()


def test_sensitivities_name_each_assumption_twice(runs: dict[str, list[Recorded]]) -> None:
    table = pd.DataFrame(script.sensitivities(runs))
    assert table["assumption"].value_counts().drop("as assumed").unique().tolist() == [2]
    more = table.query("assumption == 'private examples a round'")["hours"].tolist()
    assert table["hours"].iloc[0] < more[0] < more[1]  # what is the same for both comes to outweigh messages
    base = table.set_index("assumption").loc["as assumed", "hours"]
    slower = table.query("assumption == 'up_mbit' and factor == 0.5")["hours"].iloc[0]
    faster = table.query("assumption == 'up_mbit' and factor == 2")["hours"].iloc[0]
    assert slower < base < faster  # who sends much loses more by a slow link
