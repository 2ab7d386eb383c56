"""A comparison that several files read."""

from pathlib import Path
from typing import Any

import pytest

from semcons_ray.runs.experiment import run_experiment
from semcons_ray.studies.comparison import dump_comparison, load_comparison, plan_runs
from tests.invariants.runs import Silent

ARMS = {"consensus": {"algorithm": {"first_exchange": 1}}, "averages": {"algorithm": {"name": "fedavg_lora"}}}


@pytest.fixture(scope="package")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """A comparison of two arms with two seeds, all finished, without federations of their own."""
    out = tmp_path_factory.mktemp("compared")
    experiment = tiny_config(clients={"num_clients": 4}).model_dump(mode="json", exclude_unset=True)
    comparison = load_comparison({"seeds": [0, 1], "experiment": experiment, "arms": ARMS})
    (out / "comparison.yaml").write_text(dump_comparison(comparison))
    for one in plan_runs(comparison, out):
        run_experiment(one.config, one.folder, Silent())
    return out
