"""Where engines go, and what the plan says; no vLLM needed."""

import pytest

from semcons_ray.distributed.engines import describe_engines, plan_engines
from semcons_ray.distributed.placement import GIB, Demand, Node
from semcons_ray.errors import PlacementError

SMALL, LARGE = Demand("small", (), 1 * GIB, 2 * GIB), Demand("large", (), 3 * GIB, 8 * GIB)


def node(name: str, gib: int, *, cpus: float = 4, gpus: int = 0) -> Node:
    return Node(name, name, cpus, (1.0,) * gpus, gib * GIB, gpu_memory_bytes=16 * GIB if gpus else None)


def test_an_engine_takes_memory_and_its_own_cores_from_what_workers_get() -> None:
    (plan,), (left,) = plan_engines([SMALL], [node("a", 8)], threads=2, cpus=2, gpus=0, kept_bytes=GIB)
    assert (plan.name, plan.model, plan.node, plan.cpus, plan.memory_bytes) == ("engine-0", "small", "a", 2, GIB)
    assert (left.cpus, left.memory_bytes) == (2, 7 * GIB)


def test_without_cores_of_its_own_it_leaves_all_to_workers() -> None:
    (plan,), (left,) = plan_engines([SMALL], [node("a", 8)], threads=1, cpus=0, gpus=0, kept_bytes=GIB)
    assert left.cpus == 4
    assert "1 thread on cores of workers that wait, 1.0 GiB, small" in describe_engines([plan])


def test_the_largest_goes_where_most_memory_is() -> None:
    nodes = [node("a", 8), node("b", 6)]
    plans, left = plan_engines([SMALL, LARGE], nodes, threads=1, cpus=0, gpus=0, kept_bytes=4 * GIB)
    assert [(plan.model, plan.node) for plan in plans] == [("large", "b"), ("small", "a")]
    assert [entry.memory_bytes for entry in left] == [7 * GIB, 3 * GIB]


def test_on_gpus_it_has_a_share_that_must_hold_its_memory() -> None:
    nodes = [node("a", 32, gpus=1)]
    (plan,), (left,) = plan_engines([LARGE], nodes, threads=1, cpus=0, gpus=0.5, kept_bytes=GIB)
    assert left.gpus == (0.5,)
    assert "0.5 GPU, 3.0 GiB + 8.0 GiB of the GPU" in describe_engines([plan])
    with pytest.raises(PlacementError, match=r"8\.0 GiB in resources\.engine_gpus = 0\.3 of a GPU"):
        plan_engines([LARGE], nodes, threads=1, cpus=0, gpus=0.3, kept_bytes=GIB)


@pytest.mark.parametrize(("cpus", "kept"), [(5, 0), (0, 7 * GIB + 1)])
def test_what_does_not_fit_is_refused_with_the_setting(cpus: int, kept: int) -> None:
    with pytest.raises(PlacementError, match=r"engine of small does not fit.*resources\.engine_cache_gib"):
        plan_engines([SMALL], [node("a", 8)], threads=cpus, cpus=cpus, gpus=0, kept_bytes=kept)
