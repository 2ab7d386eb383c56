"""What a machine is said to have."""

from dataclasses import replace

import pytest

from semcons_ray.distributed import cluster
from semcons_ray.distributed.cluster import actor_options, this_node
from semcons_ray.distributed.placement import GIB, Node
from semcons_ray.metering.gpus import list_gpus, visible_gpus
from tests.metering.fakes import FakeNvml


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last is cut into three slices; the process may use the first and one of those."""
    nvml = FakeNvml([0, 0, 0, 0], slices={3: 3})
    visible = {"CUDA_VISIBLE_DEVICES": "0,MIG-3-1"}
    monkeypatch.setattr(cluster, "list_gpus", lambda: list_gpus(nvml))
    monkeypatch.setattr(cluster, "visible_gpus", lambda: visible_gpus(visible, nvml))
    monkeypatch.setattr(cluster, "cuda_fault", lambda: "")


@pytest.mark.usefixtures("four_gpus")
def test_a_process_of_its_own_has_the_gpus_that_it_sees() -> None:
    node = this_node()
    assert node.gpus == (1.0, 1.0)
    assert node.gpu_memory_bytes == 10 * GIB  # of the slice
    assert node.gpu_watts == 700.0


@pytest.mark.usefixtures("four_gpus")
def test_a_node_of_a_cluster_is_judged_by_all_of_its_gpus_whatever_the_driver_sees() -> None:
    assert len(cluster._whole_node().gpus) == 6


def test_why_torch_cannot_use_gpus_is_known_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "cuda_fault", lambda: "torch 2.13.0+cpu is built without CUDA")
    assert this_node().cuda_fault == "torch 2.13.0+cpu is built without CUDA"


@pytest.mark.parametrize(
    ("counted", "shares"), [(0, ()), (2.0, (1.0, 1.0)), (0.25, (0.25,)), (0.3333, (0.3333,)), (1.5, (1.0, 0.5))]
)
def test_gpus_are_counted_one_by_one(counted: float, shares: tuple[float, ...]) -> None:
    assert cluster._shares(counted) == shares


class Group:
    """As much of a placement group as is asked."""

    bundle_specs = ({"GPU": 0.25}, {"GPU": 0.5}, {"CPU": 2.0})


def test_a_bundle_has_the_memory_that_goes_with_its_share_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cluster, "placement_group_table", lambda group: {"bundles_to_node_id": {0: "n", 1: "n", 2: "n"}}
    )
    node = Node("n", "host", 8, (1.0, 1.0), 64 * GIB)
    bundles = cluster._list_bundles(Group(), {"n": node})  # type: ignore[arg-type]
    assert [(bundle.node_id, bundle.cpus, bundle.gpus, bundle.memory_bytes // GIB) for bundle in bundles] == [
        ("0", 0.0, (0.25,), 8),
        ("1", 0.0, (0.5,), 16),
        ("2", 2.0, (), 16),
    ]
    assert bundles[0] == replace(node, node_id="0", cpus=0.0, gpus=(0.25,), memory_bytes=8 * GIB)


def test_actors_number_gpus_as_they_are_counted() -> None:
    options = actor_options(node_id="0" * 56, threads=1, num_cpus=1, num_gpus=0.5)
    assert options["runtime_env"]["env_vars"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
