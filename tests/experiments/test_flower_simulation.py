"""What experiments/benchmarks/flower_simulation makes of the times of two runs."""

import json
from pathlib import Path

import pytest

from semcons_ray.config import load_config
from tests.experiments.scripts import load_script


def test_a_run_is_divided_at_the_ends_of_its_rounds_and_set_beside_the_other() -> None:
    run = load_script("benchmarks/flower_simulation")
    ours = run.measured((100.0, 140.0), [110.0, 120.0, 126.0, 136.0], [3.0, 2.0, 1.5, 1.2])
    assert ours == {
        "wall_seconds": 40.0,
        "start_seconds": 10.0,
        "round_seconds": [10.0, 6.0, 10.0],
        "end_seconds": 4.0,
        "nll": [3.0, 2.0, 1.5, 1.2],
    }
    theirs = run.measured((0.0, 60.0), [5.0, 35.0, 47.0, 59.0], [3.0, 2.1, 1.6, 1.3])
    slower = {**theirs, "wall_seconds": 80.0}
    ratios = run.ratios([{"ours": ours, "flower": theirs}, {"ours": ours, "flower": slower}])
    assert ratios == {
        "wall": {"median": 1.75, "lowest": 1.5, "highest": 2.0},
        "start": {"median": 0.5, "lowest": 0.5, "highest": 0.5},
        "steady_round": {"median": 1.5, "lowest": 1.5, "highest": 1.5},
    }


@pytest.mark.real
def test_both_sides_get_the_same_examples_and_settings(tmp_path: Path) -> None:
    run = load_script("benchmarks/flower_simulation")
    config = load_config(run.JOB)
    job = json.loads(run.write_job(config, tmp_path).read_text())
    data = json.loads(Path(job["data"]).read_text())
    assert [len(share) for share in data["private"]] == [config.data.examples_per_client] * config.clients.num_clients
    assert len(data["test"]) == config.data.num_test
    assert job["rank"] == config.model.lora.rank
    assert (job["batch_size"], job["eval_batch_size"]) == (config.training.batch_size, config.generation.batch_size)
