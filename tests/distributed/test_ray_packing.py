"""Shares of GPUs as Ray really gives them out; it only counts GPUs, so it can be told that some are there."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from semcons_ray.distributed import cluster
from semcons_ray.distributed.placement import GIB, Demand, Limits, Node, packed, plan_server, plan_workers
from semcons_ray.distributed.ray_server import RayServer
from semcons_ray.distributed.worker import WorkerActor
from semcons_ray.errors import PlacementError
from semcons_ray.federation.store import mark
from tests.distributed.test_ray_server import FakeServerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GPUS = 3


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """This machine as a cluster with three GPUs, from whose processes Ray was told not to hide any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "visible_gpus", lambda: [None] * GPUS)
        patch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
        patch.setattr(cluster, "passed_on", lambda: {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"})
        with cluster.connect(None):
            (node,) = cluster.list_nodes()
            yield node


@ray.remote
class Sees:
    """An actor as ours are, who says which GPU it sees."""

    def __init__(self) -> None:
        cluster.see_booked_gpus()

    def gpu(self) -> str:
        import os

        return os.environ["CUDA_VISIBLE_DEVICES"]


@ray.remote
class Keeps:
    """An actor as ours are, on a machine that says it has a GPU, and what it tells torch to keep to."""

    def told(self) -> list[float]:
        import torch

        told: list[float] = []
        torch.cuda.is_available = lambda: True
        torch.cuda.set_per_process_memory_fraction = told.append  # type: ignore[assignment]
        cluster.keep_to_booked_memory()
        return told


@pytest.mark.parametrize(("share", "told"), [(0.3, [0.3]), (1.0, []), (0.0, [])])
def test_an_actor_keeps_to_the_part_of_the_gpu_that_it_booked(node: Node, share: float, told: list[float]) -> None:
    options = cluster.actor_options(node_id=node.node_id, threads=1, num_cpus=0, num_gpus=share)
    actor = Keeps.options(**options).remote()
    try:
        assert ray.get(actor.told.remote(), timeout=60) == told
    finally:
        ray.kill(actor)


def start(node: Node, share: float) -> tuple[ray.actor.ActorHandle, ray.ObjectRef]:
    actor = Sees.options(**cluster.actor_options(node_id=node.node_id, threads=1, num_cpus=0, num_gpus=share)).remote()
    return actor, actor.gpu.remote()


@pytest.mark.parametrize(("first", "share"), [([], 0.6), ([0.3, 0.4], 0.6), ([1.0, 0.1], 1 / 3)])
def test_so_many_workers_start_as_are_planned_and_no_more(node: Node, first: list[float], share: float) -> None:
    assert node.gpus == (1.0,) * GPUS
    left = packed(node.gpus, first)
    assert left is not None
    many = Demand("m", tuple(range(99)), 1, 1)
    plan = plan_workers([many], [Node("", "", 1, left, GIB)], Limits(1, share, None), device="cuda")
    shares = [*first, *(worker.gpus for worker in plan)]
    actors = []
    try:
        seen: dict[str, float] = {}
        for each in shares:
            actor, gpu_ref = start(node, each)
            actors.append(actor)
            gpu = ray.get(gpu_ref, timeout=60)
            seen[gpu] = seen.get(gpu, 0.0) + each
        assert set(seen) <= {"0", "1", "2"}
        assert max(seen.values()) < 1.0001
        one_more, gpu_ref = start(node, plan[0].gpus)
        actors.append(one_more)
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(gpu_ref, timeout=2)
    finally:
        for actor in actors:
            ray.kill(actor)
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU", 0) < GPUS and time.monotonic() < deadline:
            time.sleep(0.1)


def test_a_server_that_finds_no_room_on_a_gpu_says_so(node: Node, tmp_path) -> None:  # type: ignore[no-untyped-def]
    server, _ = plan_server([node], memory_bytes=1, gpus=0.5)
    others = [start(node, 1.0) for _ in range(GPUS)]
    ray.get([gpu_ref for _, gpu_ref in others])
    with pytest.raises(PlacementError, match=r"no node had 0\.5 of a GPU free for the server in 1 s"):
        RayServer(
            FakeServerSpec(tmp_path),  # type: ignore[arg-type]
            node_id=server.node_id, gpus=server.gpus, timeout_seconds=60, max_restarts=0, room_timeout_seconds=1,
        )  # fmt: skip
    for actor, _ in others:
        ray.kill(actor)


def test_a_worker_says_where_it_computes_and_what_it_sees(node: Node, tmp_path: Path) -> None:
    options = cluster.actor_options(node_id=node.node_id, threads=1, num_cpus=0, num_gpus=0.5)
    worker = WorkerActor.options(**options).remote({})  # type: ignore[attr-defined]
    name = mark(tmp_path)
    for there, sees in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        arrival = ray.get(worker.arrive.remote(False, there, name))
        assert (arrival.place.node, arrival.sees_folder) == (node.name, sees)
    ray.kill(worker)
