"""Three raylets, two of which do not see the folder of the run, as on machines without a common file system."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.distributed.cluster import connect, list_nodes
from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent, assert_same_run
from tests.invariants.test_kills import progress, start
from tests.invariants.test_virtual_time import FEDERATION

pytestmark = [pytest.mark.ray, pytest.mark.nodes, pytest.mark.slow, pytest.mark.real]


@dataclass
class Machines:
    """A head node, where the driver is, and two nodes in mount namespaces of their own, in which `hidden` is empty."""

    address: str
    hidden: Path
    nodes: list[psutil.Process]

    def lose_one(self) -> None:
        """kill -9 of a node, with all that runs on it."""
        for process in (*self.nodes[0].children(recursive=True), self.nodes.pop(0)):
            process.kill()


def of_its_own(address: str, hidden: Path) -> psutil.Process:
    """A node that does not see a folder."""
    room = f"--address={address} --num-cpus=1 --object-store-memory=80000000 --disable-usage-stats --block"
    command = f"mount -t tmpfs none {hidden} && exec {sys.executable} -m ray.scripts.scripts start {room}"
    return psutil.Process(subprocess.Popen(["unshare", "-m", "sh", "-c", command], start_new_session=True).pid)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces need root")
    hidden = tmp_path / "out"
    hidden.mkdir()
    check = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 5000}
    cluster = Cluster()
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, _system_config=check)
    made = Machines(cluster.address, hidden, [])
    try:
        with connect(cluster.address):
            for count in (2, 3):  # one after the other: two that start at once may choose the same ports
                made.nodes.append(of_its_own(cluster.address, hidden))
                deadline = time.monotonic() + 120
                while len(list_nodes()) < count:
                    assert time.monotonic() < deadline, "a node did not join"
                    time.sleep(0.5)
        yield made
    finally:
        while made.nodes:
            made.lose_one()
        cluster.shutdown()


def test_a_run_without_a_common_folder_survives_a_killed_driver_and_a_lost_node(
    tiny_config: Callable[..., ExperimentConfig], machines: Machines, tmp_path: Path
) -> None:
    timed = {"num_rounds": 3, "federation": FEDERATION}
    run_experiment(tiny_config(**timed), tmp_path / "undisturbed", Silent())
    resources = {"fleet": "ray", "device": "cpu", "ray_address": machines.address}
    config, out = tmp_path / "config.yaml", machines.hidden / "run"
    config.write_text(dump_config(tiny_config(**timed, resources=resources)))
    driver = start(["run", str(config), "--out", str(out)])
    deadline = time.monotonic() + 240
    while driver.poll() is None and progress(out) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert driver.poll() is None, driver.communicate()[1]
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()

    lost: list[int] = []

    def lose_a_node(reply: Reply) -> None:
        if reply.round == 2 and not lost:
            lost.append(reply.client_id)
            machines.lose_one()

    observer = Silent(lose_a_node)
    resume_experiment(out, observer)
    assert "3 workers, 3 nodes" in observer.plan
    assert lost
    assert_same_run(tmp_path / "undisturbed", out)
