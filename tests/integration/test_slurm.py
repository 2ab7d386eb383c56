"""cluster/slurm/semcons.sbatch on a Slurm of two nodes."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.runs.experiment import run_experiment
from tests import slurm
from tests.experiments.scripts import load_script
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.real,
    pytest.mark.timeout(1500), pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
]  # fmt: skip

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "semcons.sbatch"


@pytest.fixture
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    with load_script("network", "links.py").Network(2) as network:
        yield slurm.Slurm(network, tmp_path_factory.getbasetemp())


def test_a_job_that_is_requeued_goes_on_with_its_run_on_both_nodes(
    two_nodes: slurm.Slurm, tiny_config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    sections = {"num_rounds": 6, "clients": {"num_clients": 2}}
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(**sections, resources={"fleet": "ray"})))
    out = tmp_path / "run"
    options = ["--parsable", "--nodes=2", "--cpus-per-task=1", "--mem=4G"]
    job = two_nodes.ask("sbatch", *options, str(SCRIPT), "config.yaml", str(out), cwd=tmp_path).strip()
    log = tmp_path / f"semcons-{job}.log"
    two_nodes.until((out / "state" / "round_001.msgpack").exists, 500, log)
    two_nodes.ask("scontrol", "requeue", job)
    two_nodes.until(lambda: two_nodes.state(job)["JobState"] == "PENDING", 60, log)
    assert not (out / "state" / "round_006.msgpack").exists()
    two_nodes.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # else it waits for two minutes
    two_nodes.until(lambda: two_nodes.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 500, log)
    ended = two_nodes.state(job)
    said = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    _, before, after = said.split("reading data ...")  # the log has both attempts
    for attempt in (before, after):
        assert sorted(re.findall(r"worker-\d on (\S+): .* clients (\d)$", attempt, re.MULTILINE)) == [
            ("client-0", "1"), ("client-1", "0"),
        ], said  # fmt: skip
    assert "round 1 " not in after
    assert "round 6 " in after
    run_experiment(tiny_config(**sections), tmp_path / "here", Silent())
    assert_same_run(tmp_path / "here", out)
