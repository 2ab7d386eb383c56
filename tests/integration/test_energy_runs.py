"""A run whose machine has a counter of CPU energy, alone and beside others."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig
from semcons_ray.metering.energy import CPU, CPU_THREAD_WATTS, EnergyMeter
from semcons_ray.reporting import read_run
from semcons_ray.reporting.html import energy_note
from semcons_ray.runs import assembly
from semcons_ray.runs.experiment import run_experiment

pytestmark = pytest.mark.real

WATTS = 100.0


class Clock:
    """A counter of a machine that always draws the same."""

    name = "rapl"

    def read_joules(self) -> float:
        return WATTS * time.time()


@pytest.mark.parametrize("alone", [True, False])
def test_joules_of_a_counter_that_other_runs_share_are_not_said_to_be_measured(
    alone: bool, tiny_config: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meters: dict[str, EnergyMeter] = {CPU: Clock()}
    monkeypatch.setattr(assembly, "open_meters", lambda uses_gpu: meters)
    out = tmp_path / "run"
    run_experiment(tiny_config(num_rounds=1), out, alone=alone)
    run = read_run(out)
    assert json.loads((out / "placement.json").read_text())["alone"] is alone
    busy = run.ledger[(run.ledger["stage"] != "idle") & (run.ledger["round"] > 0)]
    assert set(busy["energy_source"]) == ({"measured"} if alone else {"estimated"})
    drawn = (busy["energy_joules"] / busy["duration_seconds"]).to_numpy()
    if alone:  # with what was drawn in between
        assert drawn.min() > WATTS
    else:
        assert drawn == pytest.approx([CPU_THREAD_WATTS] * len(busy))
    assert ("energy.exclusive" in energy_note(run.placement, run.ledger)) is not alone
    assert set(pd.read_parquet(out / "ledger.parquet")["gpus"]) == {""}
