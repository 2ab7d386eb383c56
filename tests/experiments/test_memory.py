"""Planned memory of training against what was measured: as committed, and of one point measured anew."""

import json
from pathlib import Path

import pytest

from tests.experiments.scripts import load_script

memory = load_script("benchmarks/training", "memory.py")
POINTS = json.loads((memory.HERE / "memory.json").read_text(encoding="utf-8"))["points"]


def test_a_plan_is_within_15_percent_of_the_tensors_that_were_alive() -> None:
    assert len(POINTS) == len(memory.FAMILIES) * len(memory.LENGTHS) == 12
    for point in POINTS.values():
        assert point["planned_alive"] == pytest.approx(point["alive"], rel=0.15)
        assert point["process"] <= point["planned_process"]  # which is a bound


@pytest.mark.real
@pytest.mark.slow
def test_a_point_is_planned_and_measured_as_it_was(tmp_path: Path) -> None:
    found = memory.measured(memory.write_model("qwen3", tmp_path), 128)
    for what in ("planned_alive", "alive"):
        assert found[what] == pytest.approx(POINTS["qwen3, 4 x 128"][what], rel=0.01)
