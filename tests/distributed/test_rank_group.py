"""A worker of two ranks without models: one dies or fails while the other waits."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from semcons_ray.distributed import cluster
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.ray_fleet import RayFleet
from semcons_ray.errors import ConfigError
from semcons_ray.federation.fleet import NO_OTHERS, Reply
from semcons_ray.federation.store import mark

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class RankSpec:
    """In client 1's visit, rank 1 has `trouble` the first `times`, and rank 0 would wait for it for an hour."""

    folder: Path
    trouble: str = ""
    times: int = 1
    environment: tuple[str, ...] = ()

    def build(self, worker: str) -> "RankHost":
        if self.trouble == "refuse" and dist.get_rank() == 1:
            raise ConfigError("install DeepSpeed")
        return RankHost(self)


class RankHost:
    def __init__(self, spec: RankSpec) -> None:
        self.spec = spec
        self.adapter_shapes = {"lora_A": (2, 3)}
        self.first_adapter = {"lora_A": torch.full((2, 3), 1 / 3)}

    def visit(
        self, client_id: int, round: int, downlink: bytes, evaluate: bool, beside: Mapping[int, bytes] = NO_OTHERS
    ) -> Reply:
        rank = dist.get_rank()
        marks = [self.spec.folder / f"{rank}-{attempt}" for attempt in range(self.spec.times)]
        free = next((mark for mark in marks if not mark.exists()), None)
        if client_id == 1 and self.spec.trouble and free is not None:
            free.touch()
            if rank == 0:
                time.sleep(3600)
            if self.spec.trouble == "die":
                os._exit(1)
            raise RuntimeError("out of luck")
        total = torch.tensor(10.0 + rank)
        dist.all_reduce(total)
        return Reply(
            client_id=client_id, round=round, uplink=b"%d from rank %d" % (total, rank), train_loss=0.0, num_private=1,
            num_pseudo_labels=0, evaluation=None, rows=(),
        )  # fmt: skip

    def measure(self, client_id: int, round: int, downlink: bytes) -> Reply:
        return self.visit(client_id, round, downlink, True)

    def export_adapter(self, client_id: int, round: int, downlink: bytes, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(dist.get_rank())).touch()


@pytest.fixture(scope="module")
def node() -> Iterator[cluster.Node]:
    with cluster.connect(None):
        yield cluster.list_nodes()[0]


def start(node: cluster.Node, folder: Path, **trouble: object) -> RayFleet:
    """Two ranks with clients 0, 1 and 2."""
    share = min(node.cpus / 2, 1.0)
    plan = WorkerPlan("worker-0", node.node_id, node.name, "m", (0, 1, 2), 1, 0.0, 0, share, ranks=2)
    spec = RankSpec(folder, **trouble)  # type: ignore[arg-type]
    return RayFleet(
        [plan], {"m": spec}, timeout_seconds=300.0, max_restarts=1, quorum=0.5, uses_gpu=False, state=folder,
        mark=mark(folder),
    )  # fmt: skip


def visited(fleet: RayFleet) -> dict[int, bytes]:
    return {reply.client_id: reply.uplink for reply in fleet.visit(1, dict.fromkeys(range(3), b""), evaluate=False)}


def actors() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if process.name().startswith(("ray::WorkerActor", "ray::RankGroup"))]


def test_ranks_work_together_the_first_one_answers_and_none_is_left_at_the_end(
    node: cluster.Node, tmp_path: Path
) -> None:
    fleet = start(node, tmp_path)
    assert visited(fleet) == dict.fromkeys(range(3), b"21 from rank 0")
    assert torch.equal(fleet.first_adapter["lora_A"], torch.full((2, 3), 1 / 3))
    assert len(actors()) == 3  # two ranks, and the one that watches
    fleet.export_adapters(2, {2: b""}, tmp_path / "adapters")
    assert sorted(path.name for path in (tmp_path / "adapters" / "client_002").iterdir()) == ["0", "1"]
    fleet.laps()
    fleet.close()
    deadline = time.monotonic() + 30
    while (actors() or ray.available_resources().get("CPU") != node.cpus) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors()
    assert ray.available_resources().get("CPU") == node.cpus


@pytest.mark.parametrize("trouble", ["die", "fail"])
def test_a_rank_that_dies_or_fails_is_noticed_at_once_and_its_group_replaced(
    node: cluster.Node, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = start(node, tmp_path, trouble=trouble)
    assert visited(fleet) == dict.fromkeys(range(3), b"21 from rank 0")
    assert ("rank 1 of 2 died" if trouble == "die" else "out of luck") in caplog.text
    assert "took over" not in caplog.text  # as it would, were nobody watching
    fleet.close()


def test_a_client_whose_ranks_keep_dying_is_left_out_alone(node: cluster.Node, tmp_path: Path) -> None:
    fleet = start(node, tmp_path, trouble="die", times=2)
    assert sorted(visited(fleet)) == [0, 2]
    fleet.close()


def test_what_the_user_must_mend_on_any_rank_comes_out_as_it_is(node: cluster.Node, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^install DeepSpeed$"):
        start(node, tmp_path, trouble="refuse")
