"""Three Ray nodes (raylets of their own) on one machine: clients spread, a node lost in mid-round, a node joined."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from semcons_ray.config import ExperimentConfig
from semcons_ray.distributed.cluster import actor_options, connect, list_nodes
from semcons_ray.distributed.placement import Demand, Limits, WorkerPlan, plan_workers
from semcons_ray.distributed.ray_fleet import RayFleet
from semcons_ray.distributed.ray_server import RayServer
from semcons_ray.distributed.worker import ServerActor
from semcons_ray.errors import PlacementError
from semcons_ray.federation.fleet import Reply
from semcons_ray.federation.store import mark
from semcons_ray.runs.experiment import run_experiment
from tests.distributed.fakes import FakeSpec
from tests.distributed.test_ray_server import FakeServerSpec
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [pytest.mark.ray, pytest.mark.nodes, pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]


class ThreeNodes:
    """A head node, where the driver is, and two more that can be lost."""

    def __init__(self) -> None:
        # Ray looks every 3 s, five times, before it takes a node for lost.
        check = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 5000}
        self.cluster = Cluster()
        self.halted: list[psutil.Process] = []
        self.add(_system_config=check)

    def add(self, cpus: int = 1, gpus: int = 0, **more: Any) -> None:
        room = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": 80 << 20}
        self.cluster.add_node(**room, include_dashboard=False, **more)

    def set(self, cpus: int = 1, gpus: int = 0) -> "ThreeNodes":
        """Two new nodes beside the head, which always has one core."""
        for node in list(self.cluster.worker_nodes):
            self.cluster.remove_node(node, allow_graceful=False)
        for _ in range(2):
            self.add(cpus, gpus)
        self.cluster.wait_for_nodes()
        return self

    def halt(self) -> None:
        """Let the workers stand still on the node that `lose` takes, so that none answers before it is lost."""
        raylet = next(iter(self.cluster.worker_nodes)).all_processes["raylet"][0].process
        self.halted = [
            process
            for process in psutil.Process(raylet.pid).children(recursive=True)
            if "".join(process.cmdline()).startswith("ray::WorkerActor")
        ]
        for process in self.halted:
            process.suspend()

    def lose(self, node_id: str | None = None) -> None:
        """kill -9 of a node's raylet, with all that runs on it."""
        node = next(node for node in self.cluster.worker_nodes if node_id in (None, node.node_id))
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        workers = raylet.children(recursive=True)  # which would live, and answer, for a second or two after it
        self.cluster.remove_node(node, allow_graceful=False)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        while self.halted:
            self.halted.pop().kill()


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreeNodes]:
    nodes = ThreeNodes()
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_experiment(tiny_config(), out, Silent())
    return out


def on_cluster(make: MakeConfig, nodes: ThreeNodes, **more: Any) -> ExperimentConfig:
    return make(resources={"fleet": "ray", "device": "cpu", "ray_address": nodes.cluster.address}, **more)


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleets wait for room as long as ever while they start, which may take a while, and shortly from then on."""

    def make(*args: Any, **settings: Any) -> RayFleet:
        fleet = RayFleet(*args, **settings)
        fleet._room_timeout_seconds = 20
        return fleet

    monkeypatch.setattr("semcons_ray.runs.assembly.RayFleet", make)


class LosesANode(Silent):
    """Loses a node after the first reply of a round, with a client's visit under way on it."""

    def __init__(self, nodes: ThreeNodes, round: int) -> None:
        super().__init__(self.lose)
        self.nodes = nodes
        self.round = round
        self.lost = False

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        if round == self.round:
            self.nodes.halt()
            assert self.nodes.halted

    def lose(self, reply: Reply) -> None:
        if reply.round == self.round and not self.lost:
            self.lost = True
            self.nodes.lose()


def lose_a_node(config: ExperimentConfig, out: Path, nodes: ThreeNodes, *, round: int) -> str:
    """Run, and lose a node in mid-round; the placement plan."""
    observer = LosesANode(nodes, round)
    run_experiment(config, out, observer)
    assert observer.lost
    return observer.plan


@pytest.mark.usefixtures("short_wait")
def test_a_node_lost_in_mid_round_shrinks_the_vote_and_the_survivors_numbers_stay(
    tiny_config: MakeConfig, nodes: ThreeNodes, tiniest: Path, tiny_llama: Path, tiny_qwen: Path, tmp_path: Path
) -> None:
    """Each client has a model of its own, and the other nodes are full, so the lost node's client sits out."""
    nodes.set()
    models = {"clients": {"num_clients": 3, "mix": {str(path): 1 for path in (tiniest, tiny_llama, tiny_qwen)}}}
    undisturbed = tmp_path / "undisturbed"
    run_experiment(tiny_config(**models), undisturbed, Silent())
    plan = lose_a_node(on_cluster(tiny_config, nodes, **models), tmp_path / "run", nodes, round=1)
    assert "3 clients on 3 workers, 3 nodes" in plan
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet").set_index("round")
    assert rounds["num_answered"].tolist()[1:] == [2, 2]
    gone = int(rounds.loc[1, "lost"])
    keys = ["round", "client_id"]
    runs = [pd.read_parquet(out / "metrics.parquet").set_index(keys) for out in (undisturbed, tmp_path / "run")]
    survivors = [(1, client) for client in range(3) if client != gone]
    pd.testing.assert_frame_equal(*(run.loc[survivors] for run in runs), check_exact=True)
    votes = [pd.read_parquet(out / "consensus" / "round_001.parquet") for out in (undisturbed, tmp_path / "run")]
    answers = [vote[vote["client_id"] != gone].set_index(["prompt_id", "client_id"])["answer"] for vote in votes]
    pd.testing.assert_series_equal(*answers)
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 3  # the lost one's by a worker that made room


@pytest.mark.parametrize(("cpus", "round"), [(1, 1), (2, 2)])
def test_a_node_lost_in_mid_round_changes_no_number_where_others_have_its_model(
    tiny_config: MakeConfig, nodes: ThreeNodes, undisturbed: Path, tmp_path: Path, cpus: int, round: int
) -> None:
    """Full or not: workers of its model visit its client."""
    nodes.set(cpus)
    lose_a_node(on_cluster(tiny_config, nodes), tmp_path / "run", nodes, round=round)
    assert_same_run(undisturbed, tmp_path / "run")


OWN = """
from dataclasses import dataclass
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus

class Algorithm(SemanticConsensus):
    pass

def rule(ballots):
    return ballots.similarity
"""


class Removes(Silent):
    """Removes a module of the working folder before workers start."""

    def __init__(self, module: Path) -> None:
        super().__init__()
        self.module = module

    def stage(self, text: str) -> None:
        if text == "loading models":
            self.module.unlink()


def test_parts_of_ones_own_reach_workers_of_all_nodes(
    tiny_config: MakeConfig, nodes: ThreeNodes, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = tmp_path / "own_of_nodes.py"
    module.write_text(OWN)
    algorithm = {"name": "own_of_nodes:Algorithm", "rule": "own_of_nodes:rule"}
    observer = Removes(module)
    run_experiment(on_cluster(tiny_config, nodes, algorithm=algorithm), tmp_path / "run", observer)
    assert "3 clients on 3 workers, 3 nodes" in observer.plan
    assert_same_run(undisturbed, tmp_path / "run")
    del sys.modules["own_of_nodes"]


@pytest.fixture
def fleet(nodes: ThreeNodes, tmp_path: Path) -> Iterator[RayFleet]:
    """A client without a model on each of three full nodes."""
    nodes.set()
    with connect(nodes.cluster.address):
        plans = [
            WorkerPlan(f"worker-{i}", node.node_id, node.name, f"m{i}", (i,), 1, 0.0, 0)
            for i, node in enumerate(list_nodes())
        ]
        specs = {plan.model: FakeSpec(tmp_path) for plan in plans}
        fleet = RayFleet(
            plans, specs, timeout_seconds=60, max_restarts=1, quorum=0.5, uses_gpu=False, state=tmp_path,
            mark=mark(tmp_path),
        )  # fmt: skip
        fleet._room_timeout_seconds = 5
        yield fleet
        fleet.close()


def answered(fleet: RayFleet, round: int) -> list[int]:
    return sorted(reply.client_id for reply in fleet.visit(round, dict.fromkeys(range(3), b""), evaluate=False))


def test_a_node_that_joins_takes_the_clients_of_one_that_was_lost(fleet: RayFleet, nodes: ThreeNodes) -> None:
    assert answered(fleet, 1) == [0, 1, 2]
    nodes.lose(fleet._workers["worker-1"].plan.node_id)
    assert answered(fleet, 2) == [0, 2]
    began = time.monotonic()
    assert answered(fleet, 3) == [0, 2]
    assert time.monotonic() - began < 5  # later rounds do not wait again
    assert fleet.laps() == []  # and nobody waits for its meter
    nodes.add()
    round, deadline = 4, time.monotonic() + 60
    while answered(fleet, round) != [0, 1, 2]:
        assert time.monotonic() < deadline
        round += 1
        time.sleep(0.5)


def test_a_server_lost_with_its_node_is_told_everything_again_on_another(
    fleet: RayFleet, nodes: ThreeNodes, tmp_path: Path
) -> None:
    state = tmp_path / "server"
    state.mkdir()
    lost = fleet._workers["worker-1"].plan.node_id
    server = RayServer(FakeServerSpec(state), node_id=lost, gpus=0.0, timeout_seconds=60, max_restarts=1)  # type: ignore[arg-type]
    server.begin(1, [0, 1])
    server.collect(0, b"one")
    nodes.lose(lost)
    server.collect(1, b"two")
    assert server.conclude() == ["begin 1 (0, 1)", "one", "two"]
    server.close()


def test_actors_that_book_no_core_are_on_the_node_of_their_plan(nodes: ThreeNodes) -> None:
    with connect(nodes.set().cluster.address):
        planned = [node.node_id for node in list_nodes()] * 3
        actors = [
            ServerActor.options(**actor_options(node_id=node_id, threads=1, num_cpus=0, num_gpus=0)).remote({})  # type: ignore[attr-defined]
            for node_id in planned
        ]
        asked = [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in actors]
        found = ray.get(asked)
        for actor in actors:
            ray.kill(actor)
    assert found == planned


def test_a_cluster_that_others_have_filled_is_no_reason_to_wait_for_ever(fleet: RayFleet, tmp_path: Path) -> None:
    plan = fleet._workers["worker-0"].plan
    with pytest.raises(PlacementError, match=r"no node had 1 of the CPU cores free for worker-0 in 1 s; "):
        RayFleet(
            [plan], {plan.model: FakeSpec(tmp_path)}, timeout_seconds=60, max_restarts=0, quorum=0.5, uses_gpu=False,
            room_timeout_seconds=1, state=tmp_path, mark="",
        )  # fmt: skip


def test_declared_gpus_decide_the_spread(nodes: ThreeNodes) -> None:
    nodes.set(gpus=1)
    with connect(nodes.cluster.address):
        found = list_nodes()
    assert sorted(node.gpus for node in found) == [(), (1.0,), (1.0,)]
    demand = Demand("m", tuple(range(4)), host_bytes=1, device_bytes=1)
    limits = Limits(threads_per_worker=1, gpus_per_worker=0.5, max_workers=None)
    workers = plan_workers([demand], found, limits, device="cuda")
    with_gpus = {node.node_id for node in found if node.gpus}
    assert Counter(worker.node_id for worker in workers) == dict.fromkeys(with_gpus, 2)
    assert {worker.gpus for worker in workers} == {0.5}
