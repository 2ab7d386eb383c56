import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.distributed.placement import GIB, Demand, Limits, Node, WorkerPlan, describe_plan, plan_workers
from semcons_ray.errors import PlacementError

SMALL = Demand("small", (0, 1, 2, 3), host_bytes=2 * GIB, device_bytes=1 * GIB)


def node(
    name: str = "a", cpus: float = 4, gpus: float = 0, memory: float = 64, gpu_memory: float | None = None
) -> Node:
    return Node(name, name, cpus, gpus, int(memory * GIB), None if gpu_memory is None else int(gpu_memory * GIB))


def limits(threads: int = 1, gpus: float = 1.0, workers: int | None = None, server_gpus: float = 0.0) -> Limits:
    return Limits(threads, gpus, workers, server_bytes=1 * GIB, server_gpus=server_gpus)


def test_one_actor_a_client_where_there_is_room() -> None:
    plan = plan_workers([SMALL], [node(cpus=8)], limits(), device="cpu")
    assert [worker.clients for worker in plan] == [(0,), (1,), (2,), (3,)]


def test_clients_share_actors_where_cores_are_few() -> None:
    plan = plan_workers([SMALL], [node(cpus=2)], limits(), device="cpu")
    assert [worker.clients for worker in plan] == [(0, 2), (1, 3)]


def test_clients_share_actors_where_memory_is_short() -> None:
    plan = plan_workers([SMALL], [node(cpus=8, memory=5.5)], limits(), device="cpu")  # 1 GiB is the server's
    assert [worker.clients for worker in plan] == [(0, 2), (1, 3)]


def test_threads_count_against_cores() -> None:
    assert len(plan_workers([SMALL], [node(cpus=8)], limits(threads=4), device="cpu")) == 2


def test_workers_spread_over_nodes() -> None:
    plan = plan_workers([SMALL], [node("a"), node("b")], limits(), device="cpu")
    assert sorted(worker.node for worker in plan) == ["a", "a", "b", "b"]


def test_every_architecture_gets_a_worker_before_any_gets_two() -> None:
    other = Demand("other", (4,), host_bytes=3 * GIB, device_bytes=1 * GIB)
    plan = plan_workers([SMALL, other], [node(cpus=2)], limits(), device="cpu")
    assert [(worker.model, worker.clients) for worker in plan] == [("small", (0, 1, 2, 3)), ("other", (4,))]


def test_gpu_shares_pack_clients_onto_a_gpu() -> None:
    plan = plan_workers([SMALL], [node(gpus=1, gpu_memory=8)], limits(gpus=0.5), device="cuda")
    assert [worker.gpus for worker in plan] == [0.5, 0.5]


def test_the_server_keeps_its_share_of_the_gpu() -> None:
    plan = plan_workers([SMALL], [node(gpus=1, gpu_memory=8)], limits(gpus=0.25, server_gpus=0.25), device="cuda")
    assert len(plan) == 3


def models(*host_gib: float) -> list[Demand]:
    """Models a, b, ... of these sizes, with a client each."""
    return [Demand("abcde"[i], (i,), int(gib * GIB), GIB) for i, gib in enumerate(host_gib)]


def test_three_models_share_two_cores() -> None:
    plan = plan_workers(models(3, 2, 1), [node(cpus=2)], limits(), device="cpu")
    assert [(worker.model, worker.num_cpus, worker.threads) for worker in plan] == [
        ("a", 0.6666, 1),  # 2/3, rounded down to the step that cores are booked in
        ("b", 0.6666, 1),
        ("c", 0.6666, 1),
    ]


def test_three_models_on_two_nodes_of_a_core_share_one_of_them() -> None:
    """a goes to y, since x has the server; b to x; c to x too, which has 64 - 1 - 2 GiB left, and y 64 - 3.5."""
    plan = plan_workers(models(3.5, 2, 1), [node("x", cpus=1), node("y", cpus=1)], limits(), device="cpu")
    assert [(worker.node, worker.num_cpus) for worker in plan] == [("y", 1), ("x", 0.5), ("x", 0.5)]
    assert [worker.shared_cpus for worker in plan] == [None, 0.5, 0.5]


def test_the_node_with_more_cores_takes_the_worker_left_over() -> None:
    """With 3 threads each, one fits on x and one on y; the third goes where a core has 1/5 of a worker, not 1/3."""
    plan = plan_workers(models(3, 2, 1), [node("x", cpus=3), node("y", cpus=5)], limits(threads=3), device="cpu")
    assert [(worker.node, worker.num_cpus) for worker in plan] == [("y", 2.5), ("x", 3), ("y", 2.5)]


def test_five_models_share_one_core() -> None:
    plan = plan_workers(models(5, 4, 3, 2, 1), [node(cpus=1)], limits(), device="cpu")
    assert [worker.num_cpus for worker in plan] == [0.2] * 5


def test_no_cores_are_shared_where_there_are_enough() -> None:
    """Two models on three cores: a worker each, and one more for the first, which has two clients."""
    first = Demand("first", (0, 1), host_bytes=GIB, device_bytes=GIB)
    second = Demand("second", (2,), host_bytes=GIB, device_bytes=GIB)
    plan = plan_workers([first, second], [node("n", cpus=3)], limits(), device="cpu")
    assert plan == (
        WorkerPlan("worker-0", "n", "n", "first", (0,), 1, 0.0, GIB),
        WorkerPlan("worker-1", "n", "n", "first", (1,), 1, 0.0, GIB),
        WorkerPlan("worker-2", "n", "n", "second", (2,), 1, 0.0, GIB),
    )
    assert [worker.num_cpus for worker in plan] == [1, 1, 1]
    assert "shar" not in describe_plan(plan, "cpu", {})


def test_models_that_share_cores_still_need_their_memory() -> None:
    """3 + 2 GiB and the server's one fill 6 of 6.5 GiB; c's one is too much."""
    with pytest.raises(PlacementError, match=r"of c needs 1\.0 GiB.*left is 0\.5 GiB.*resources\.memory_limit_gib"):
        plan_workers(models(3, 2, 1), [node(cpus=2, memory=6.5)], limits(), device="cpu")


def test_memory_on_a_node_without_cores_is_no_use() -> None:
    nodes = [node("head", cpus=0), node("x", cpus=1, memory=4)]
    with pytest.raises(PlacementError, match=r"left is 1\.0 GiB.*resources\.memory_limit_gib"):
        plan_workers(models(3, 2), nodes, limits(), device="cpu")


def test_workers_that_take_turns_have_all_cores_each() -> None:
    in_turn = Limits(2, 1.0, 3, server_bytes=GIB, server_gpus=0.0, one_by_one=True)
    plan = plan_workers(models(3, 2, 1), [node(cpus=2)], in_turn, device="cpu")
    assert [(worker.model, worker.threads, worker.shared_cpus) for worker in plan] == [
        ("a", 2, None),
        ("b", 2, None),
        ("c", 2, None),
    ]
    with pytest.raises(PlacementError, match=r"resources\.threads_per_worker"):
        plan_workers(models(3, 2, 1), [node(cpus=1)], in_turn, device="cpu")
    with pytest.raises(PlacementError, match=r"resources\.memory_limit_gib"):
        plan_workers(models(3, 2, 1), [node(cpus=2, memory=6.5)], in_turn, device="cpu")


def test_gpus_are_not_shared_beyond_their_shares() -> None:
    with pytest.raises(PlacementError, match=r"resources\.gpus_per_worker"):
        plan_workers(models(2, 1), [node(gpus=1, gpu_memory=8)], limits(), device="cuda")


@pytest.mark.parametrize(
    ("given_node", "given_limits", "device", "setting"),
    [
        (node(memory=2), limits(), "cpu", "resources.memory_limit_gib"),
        (node(cpus=2), limits(threads=4), "cpu", "resources.threads_per_worker"),
        (node(gpus=0), limits(), "cuda", "resources.gpus_per_worker"),
        (node(gpus=1, gpu_memory=1.5), limits(gpus=0.5), "cuda", "training.batch_size"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_to_change(
    given_node: Node, given_limits: Limits, device: str, setting: str
) -> None:
    with pytest.raises(PlacementError, match=setting):
        plan_workers([SMALL], [given_node], given_limits, device=device)


def test_more_architectures_than_workers_are_refused() -> None:
    other = Demand("other", (4,), host_bytes=GIB, device_bytes=GIB)
    with pytest.raises(PlacementError, match=r"resources\.max_workers is 1"):
        plan_workers([SMALL, other], [node()], limits(workers=1), device="cpu")


LARGE = Demand("large", (0, 1), host_bytes=6 * GIB, device_bytes=5 * GIB, ranks=2)


def test_a_model_of_several_ranks_takes_a_core_and_its_threads_for_each() -> None:
    plan = plan_workers([LARGE], [node("a", cpus=3), node("b", cpus=8)], limits(threads=2), device="cpu")
    assert [(worker.node, worker.clients, worker.ranks, worker.num_cpus) for worker in plan] == [
        ("b", (0,), 2, 2),
        ("b", (1,), 2, 2),
    ]


def test_ranks_share_cores_with_others_where_there_are_too_few() -> None:
    other = Demand("other", (2,), host_bytes=GIB, device_bytes=GIB)
    plan = plan_workers([LARGE, other], [node(cpus=2)], limits(), device="cpu")
    assert [(worker.model, worker.ranks, worker.num_cpus) for worker in plan] == [
        ("large", 2, 0.6666),
        ("other", 1, 0.6666),
    ]
    text = describe_plan(plan, "cpu", {})
    assert "worker-0 on a: 2 ranks of 1 thread sharing cores (0.67), 6.0 GiB, large, clients 0, 1" in text


def test_each_rank_takes_a_whole_gpu() -> None:
    plan = plan_workers([LARGE], [node("a", gpus=1), node("b", gpus=3, gpu_memory=6)], limits(gpus=0.5), device="cuda")
    assert [(worker.node, worker.ranks, worker.gpus) for worker in plan] == [("b", 2, 1.0)]
    text = describe_plan(plan, "cuda", {"large": LARGE})
    assert "2 ranks of 1 GPU, 6.0 GiB + 5.0 GiB of each GPU, large" in text
    with pytest.raises(PlacementError, match=r"no node has 2 GPUs free for the ranks of large.*sharding\.models"):
        plan_workers([LARGE], [node("a", gpus=1), node("b", gpus=1)], limits(), device="cuda")


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    cpus=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    memory=st.integers(4, 64),
    most=st.none() | st.integers(1, 20),
)
def test_a_plan_hosts_each_client_once_and_stays_within_every_node(
    sizes: list[int], cpus: list[int], memory: int, most: int | None
) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    demands = [
        Demand(f"m{i}", tuple(range(start, start + size)), (i + 1) * GIB, GIB)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    nodes = [node(f"n{i}", cpus=count, memory=memory) for i, count in enumerate(cpus)]
    try:
        plan = plan_workers(demands, nodes, limits(workers=most), device="cpu")
    except PlacementError:
        return
    assert sorted(client for worker in plan for client in worker.clients) == list(range(sum(sizes)))
    assert most is None or len(plan) <= most
    for here in nodes:
        placed = [worker for worker in plan if worker.node_id == here.node_id]
        assert sum(worker.num_cpus for worker in placed) <= here.cpus
        if any(worker.shared_cpus for worker in placed):
            assert len({worker.shared_cpus for worker in placed}) == 1
            assert len({worker.model for worker in placed}) == len(placed) > here.cpus
        assert sum(worker.memory_bytes for worker in placed) <= here.memory_bytes
    loads = [len(worker.clients) for worker in plan if worker.model == "m0"]
    assert max(loads) - min(loads) <= 1


def test_the_printed_plan_names_workers_shares_and_clients() -> None:
    plan = plan_workers([SMALL], [node(gpus=1, gpu_memory=8)], limits(gpus=0.5), device="cuda")
    text = describe_plan(plan, "cuda", {"small": SMALL})
    assert "4 clients on 2 workers, 1 node, device cuda" in text
    assert "worker-0 on a: 0.5 GPU, 2.0 GiB + 1.0 GiB of the GPU, small, clients 0, 2" in text


def test_the_printed_plan_says_that_workers_share_cores() -> None:
    plan = plan_workers(models(3, 2, 1), [node(cpus=2)], limits(), device="cpu")
    text = describe_plan(plan, "cpu", {})
    assert "models are more than cores: 3 workers share cores" in text
    assert "worker-0 on a: 1 thread sharing cores (0.67), 3.0 GiB, a, clients 0" in text
