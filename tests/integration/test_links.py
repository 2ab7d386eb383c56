"""Nodes behind links of a set rate, in network namespaces."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.scripts import load_script

pytestmark = [pytest.mark.ray, pytest.mark.nodes, pytest.mark.slow]

MBIT, BYTES = 8.0, 1_000_000

VISITS = f"""
import sys, time
from dataclasses import dataclass
from pathlib import Path
from semcons_ray.distributed.cluster import connect, list_nodes
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.ray_fleet import RayFleet
from semcons_ray.federation.fleet import Reply
from semcons_ray.federation.store import mark

class Sends:
    adapter_shapes = {{}}
    def visit(self, client_id, round, downlink, evaluate, beside):
        time.sleep(0.2 * client_id)  # the first message is on its way when the second is ready
        return Reply(client_id=client_id, round=round, uplink=bytes({BYTES}), train_loss=0.0, num_private=1,
                     num_pseudo_labels=0, evaluation=None, rows=())

@dataclass(frozen=True)
class Spec:
    environment: tuple = ()
    def build(self, worker):
        return Sends()

with connect(sys.argv[1]):
    nodes = [node for node in list_nodes() if node.cpus]
    plans = [WorkerPlan(f"worker-{{i}}", node.node_id, node.name, "m", (i,), 1, 0.0, 0) for i, node in enumerate(nodes)]
    state = Path(sys.argv[2])
    fleet = RayFleet(plans, {{"m": Spec()}}, timeout_seconds=60, max_restarts=0, quorum=1.0, uses_gpu=False,
                     state=state, mark=mark(state))
    began = time.monotonic()
    assert len(list(fleet.visit(1, {{0: b"", 1: b""}}, evaluate=False))) == 2
    print("seconds", time.monotonic() - began)
    fleet.close()
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="net-", dir="/tmp") as folder:
        yield Path(folder)


def test_messages_of_clients_cross_their_links_at_the_same_time(short_folder: Path) -> None:
    if not shutil.which("tc") or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces need root and iproute2")
    links, nodes = load_script("network", "links.py"), load_script("network", "nodes.py")
    (short_folder / "state").mkdir()
    (short_folder / "visits.py").write_text(VISITS)
    with links.Network(2) as network:
        cluster = nodes.Cluster(network, short_folder)
        network.limit(MBIT)
        said = cluster.run(str(short_folder / "visits.py"), cluster.address, str(short_folder / "state"))
    one = BYTES * 8 / (MBIT * 1e6)
    assert one < float(said.split("seconds ")[1]) < 1.7 * one
