import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from semcons_ray.distributed.engines import plan_engines
from semcons_ray.distributed.placement import (
    GIB,
    Demand,
    Limits,
    Node,
    ServerPlan,
    WorkerPlan,
    choose_device,
    describe_plan,
    in_steps,
    packed,
    plan_server,
    plan_workers,
    unused_gpus,
)
from semcons_ray.errors import PlacementError

SMALL = Demand("small", (0, 1, 2, 3), host_bytes=2 * GIB, device_bytes=1 * GIB)


def node(name: str = "a", cpus: float = 4, gpus: int = 0, memory: float = 64, gpu_memory: float | None = None) -> Node:
    gpu_bytes = None if gpu_memory is None else int(gpu_memory * GIB)
    return Node(name, name, cpus, (1.0,) * gpus, int(memory * GIB), gpu_bytes)


def limits(threads: int = 1, gpus: float = 1.0, workers: int | None = None) -> Limits:
    return Limits(threads, gpus, workers)


def plan_with_server(
    demands: Sequence[Demand], nodes: Sequence[Node], limits: Limits, *, device: str, server_gpus: float = 0.0
) -> tuple[WorkerPlan, ...]:
    """Beside a server that takes 1 GiB of the first node."""
    _, left = plan_server(nodes, memory_bytes=GIB, gpus=server_gpus)
    return plan_workers(demands, left, limits, device=device)


def test_one_actor_a_client_where_there_is_room() -> None:
    plan = plan_with_server([SMALL], [node(cpus=8)], limits(), device="cpu")
    assert [worker.clients for worker in plan] == [(0,), (1,), (2,), (3,)]


def test_clients_share_actors_where_cores_are_few() -> None:
    plan = plan_with_server([SMALL], [node(cpus=2)], limits(), device="cpu")
    assert [worker.clients for worker in plan] == [(0, 2), (1, 3)]


ELSEWHERE = Demand("closed", (4, 5, 6), host_bytes=GIB, device_bytes=0, elsewhere=True)


def test_answers_from_elsewhere_have_one_worker_that_takes_memory_alone() -> None:
    alone = plan_with_server([SMALL], [node(cpus=2)], limits(workers=2), device="cpu")
    plan = plan_with_server([SMALL, ELSEWHERE], [node(cpus=2)], limits(workers=2), device="cpu")
    assert plan[:2] == alone
    beside = plan[2]
    assert (beside.clients, beside.num_cpus, beside.gpus, beside.memory_bytes) == ((4, 5, 6), 0, 0.0, GIB)
    assert (
        "  worker-2 on a: no core: answers come from elsewhere, 1.0 GiB, closed, clients 4, 5, 6"
        in describe_plan(plan, "cpu", {}).splitlines()
    )
    with_gpu = plan_with_server([SMALL, ELSEWHERE], [node(gpus=1)], limits(), device="cuda")
    assert (with_gpu[-1].num_cpus, with_gpu[-1].gpus) == (0, 0.0)
    only = plan_with_server([ELSEWHERE], [node(cpus=1)], limits(threads=4), device="cpu")
    assert [worker.clients for worker in only] == [(4, 5, 6)]
    for own, chosen in ((node(), "a"), (node(memory=1.5), "b")):  # the driver's own node, where the run's folder is
        assert plan_with_server([ELSEWHERE], [own, node("b"), node("c")], limits(), device="cpu")[0].node_id == chosen
    with pytest.raises(PlacementError, match=r"a worker of closed needs 1\.0 GiB of host memory"):
        plan_with_server([ELSEWHERE], [node(memory=1.5)], limits(), device="cpu")


def test_clients_share_actors_where_memory_is_short() -> None:
    plan = plan_with_server([SMALL], [node(cpus=8, memory=5.5)], limits(), device="cpu")  # 1 GiB is the server's
    assert [worker.clients for worker in plan] == [(0, 2), (1, 3)]


def test_threads_count_against_cores() -> None:
    assert len(plan_with_server([SMALL], [node(cpus=8)], limits(threads=4), device="cpu")) == 2


def test_workers_spread_over_nodes() -> None:
    plan = plan_with_server([SMALL], [node("a"), node("b")], limits(), device="cpu")
    assert sorted(worker.node for worker in plan) == ["a", "a", "b", "b"]


def test_every_architecture_gets_a_worker_before_any_gets_two() -> None:
    other = Demand("other", (4,), host_bytes=3 * GIB, device_bytes=1 * GIB)
    plan = plan_with_server([SMALL, other], [node(cpus=2)], limits(), device="cpu")
    assert [(worker.model, worker.clients) for worker in plan] == [("small", (0, 1, 2, 3)), ("other", (4,))]


def test_gpu_shares_pack_clients_onto_a_gpu() -> None:
    plan = plan_with_server([SMALL], [node(gpus=1, gpu_memory=8)], limits(gpus=0.5), device="cuda")
    assert [worker.gpus for worker in plan] == [0.5, 0.5]


def test_the_server_keeps_its_share_of_the_gpu() -> None:
    nodes = [node(gpus=1, gpu_memory=8)]
    assert len(plan_with_server([SMALL], nodes, limits(gpus=0.25), device="cuda", server_gpus=0.25)) == 3


def models(*host_gib: float) -> list[Demand]:
    """Models a, b, ... of these sizes, with a client each."""
    return [Demand("abcde"[i], (i,), int(gib * GIB), GIB) for i, gib in enumerate(host_gib)]


def test_three_models_share_two_cores() -> None:
    plan = plan_with_server(models(3, 2, 1), [node(cpus=2)], limits(), device="cpu")
    assert [(worker.model, worker.num_cpus, worker.threads) for worker in plan] == [
        ("a", 0.6666, 1),  # 2/3, rounded down to the step that cores are booked in
        ("b", 0.6666, 1),
        ("c", 0.6666, 1),
    ]


def test_three_models_on_two_nodes_of_a_core_share_one_of_them() -> None:
    """a goes to y, since x has the server; b to x; c to x too, which has 64 - 1 - 2 GiB left, and y 64 - 3.5."""
    plan = plan_with_server(models(3.5, 2, 1), [node("x", cpus=1), node("y", cpus=1)], limits(), device="cpu")
    assert [(worker.node, worker.num_cpus) for worker in plan] == [("y", 1), ("x", 0.5), ("x", 0.5)]
    assert [worker.shared_cpus for worker in plan] == [None, 0.5, 0.5]


def test_the_node_with_more_cores_takes_the_worker_left_over() -> None:
    """With 3 threads each, one fits on x and one on y; the third goes where a core has 1/5 of a worker, not 1/3."""
    plan = plan_with_server(models(3, 2, 1), [node("x", cpus=3), node("y", cpus=5)], limits(threads=3), device="cpu")
    assert [(worker.node, worker.num_cpus) for worker in plan] == [("y", 2.5), ("x", 3), ("y", 2.5)]


def test_five_models_share_one_core() -> None:
    plan = plan_with_server(models(5, 4, 3, 2, 1), [node(cpus=1)], limits(), device="cpu")
    assert [worker.num_cpus for worker in plan] == [0.2] * 5


def test_no_cores_are_shared_where_there_are_enough() -> None:
    """Two models on three cores: a worker each, and one more for the first, which has two clients."""
    first = Demand("first", (0, 1), host_bytes=GIB, device_bytes=GIB)
    second = Demand("second", (2,), host_bytes=GIB, device_bytes=GIB)
    plan = plan_with_server([first, second], [node("n", cpus=3)], limits(), device="cpu")
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
        plan_with_server(models(3, 2, 1), [node(cpus=2, memory=6.5)], limits(), device="cpu")


def test_memory_on_a_node_without_cores_is_no_use() -> None:
    nodes = [node("head", cpus=0), node("x", cpus=1, memory=4)]
    with pytest.raises(PlacementError, match=r"left is 1\.0 GiB.*resources\.memory_limit_gib"):
        plan_with_server(models(3, 2), nodes, limits(), device="cpu")


def test_workers_that_take_turns_have_all_cores_each() -> None:
    in_turn = Limits(2, 1.0, 3, one_by_one=True)
    plan = plan_with_server(models(3, 2, 1), [node(cpus=2)], in_turn, device="cpu")
    assert [(worker.model, worker.threads, worker.shared_cpus) for worker in plan] == [
        ("a", 2, None),
        ("b", 2, None),
        ("c", 2, None),
    ]
    with pytest.raises(PlacementError, match=r"resources\.threads_per_worker"):
        plan_with_server(models(3, 2, 1), [node(cpus=1)], in_turn, device="cpu")
    with pytest.raises(PlacementError, match=r"resources\.memory_limit_gib"):
        plan_with_server(models(3, 2, 1), [node(cpus=2, memory=6.5)], in_turn, device="cpu")


def test_gpus_are_not_shared_beyond_their_shares() -> None:
    with pytest.raises(PlacementError, match=r"resources\.gpus_per_worker"):
        plan_with_server(models(2, 1), [node(gpus=1, gpu_memory=8)], limits(), device="cuda")


LARGE = Demand("large", (0, 1), host_bytes=6 * GIB, device_bytes=5 * GIB, ranks=2)


def test_a_model_of_several_ranks_takes_a_core_and_its_threads_for_each() -> None:
    plan = plan_with_server([LARGE], [node("a", cpus=3), node("b", cpus=8)], limits(threads=2), device="cpu")
    assert [(worker.node, worker.clients, worker.ranks, worker.num_cpus) for worker in plan] == [
        ("b", (0,), 2, 2),
        ("b", (1,), 2, 2),
    ]


def test_ranks_share_cores_with_others_where_there_are_too_few() -> None:
    other = Demand("other", (2,), host_bytes=GIB, device_bytes=GIB)
    plan = plan_with_server([LARGE, other], [node(cpus=2)], limits(), device="cpu")
    assert [(worker.model, worker.ranks, worker.num_cpus) for worker in plan] == [
        ("large", 2, 0.6666),
        ("other", 1, 0.6666),
    ]
    text = describe_plan(plan, "cpu", {})
    assert "worker-0 on a: 2 ranks of 1 thread sharing cores (0.67), 6.0 GiB, large, clients 0, 1" in text


def test_each_rank_takes_a_whole_gpu() -> None:
    plan = plan_with_server(
        [LARGE], [node("a", gpus=1), node("b", gpus=3, gpu_memory=6)], limits(gpus=0.5), device="cuda"
    )
    assert [(worker.node, worker.ranks, worker.gpus) for worker in plan] == [("b", 2, 1.0)]
    text = describe_plan(plan, "cuda", {"large": LARGE})
    assert "2 ranks of 1 GPU, 6.0 GiB + 5.0 GiB of each GPU, large" in text
    with pytest.raises(PlacementError, match=r"no node has 2 GPUs free for the ranks of large.*sharding\.models"):
        plan_with_server([LARGE], [node("a", gpus=1), node("b", gpus=1)], limits(), device="cuda")


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
        plan = plan_with_server(demands, nodes, limits(workers=most), device="cpu")
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
    plan = plan_with_server([SMALL], [node(gpus=1, gpu_memory=8)], limits(gpus=0.5), device="cuda")
    text = describe_plan(plan, "cuda", {"small": SMALL})
    assert "4 clients on 2 workers, 1 node, device cuda" in text
    assert "worker-0 on a: 0.5 GPU, 2.0 GiB + 1.0 GiB of the GPU, small, clients 0, 2" in text


def test_the_printed_plan_says_what_a_workers_memory_is_for() -> None:
    small = replace(SMALL, parts={"weights": GIB // 2, "context": 3 * GIB // 4})
    plan = plan_with_server([small], [node(gpus=1, gpu_memory=8)], limits(), device="cuda")
    last = "  GiB of a worker of small: weights 0.50, context 0.75"
    assert describe_plan(plan, "cuda", {"small": small}).splitlines()[-1] == last


def test_the_printed_plan_says_that_workers_share_cores() -> None:
    plan = plan_with_server(models(3, 2, 1), [node(cpus=2)], limits(), device="cpu")
    text = describe_plan(plan, "cpu", {})
    assert "models are more than cores: 3 workers share cores" in text
    assert "worker-0 on a: 1 thread sharing cores (0.67), 3.0 GiB, a, clients 0" in text


# --- shares of GPUs


@pytest.mark.parametrize(
    ("gpus", "shares", "left"),
    [
        ((1.0, 1.0), [0.6, 0.6], (0.4, 0.4)),
        ((1.0, 1.0), [0.6, 0.6, 0.6], None),
        ((1.0, 1.0), [0.5] * 4, (0.0, 0.0)),
        ((1.0,), [0.1] * 10, (0.0,)),
        ((1.0, 1.0), [0.3, 0.4, 0.6], (0.3, 0.4)),
        ((0.7, 0.4, 1.0), [0.4], (0.7, 0.0, 1.0)),  # where the least is left
        ((0.5, 1.0), [1.0, 0.5], (0.0, 0.0)),
        ((0.9, 0.9), [1.0], None),
        ((), [0.1], None),
        ((), [], ()),
    ],
)
def test_shares_are_put_on_one_gpu_after_another(
    gpus: tuple[float, ...], shares: list[float], left: tuple[float, ...] | None
) -> None:
    assert packed(gpus, shares) == left


def test_shares_are_booked_in_steps_so_that_six_sixths_fit() -> None:
    assert [in_steps(share) for share in (1 / 6, 0.33333, 0.1, 0.29, 1.0)] == [0.1666, 0.3333, 0.1, 0.29, 1.0]
    eight = Demand("m", tuple(range(8)), GIB, GIB)
    plan = plan_workers([eight], [node(gpus=1)], limits(gpus=1 / 6), device="cuda")
    assert [worker.gpus for worker in plan] == [0.1666] * 6


@pytest.mark.parametrize(("share", "workers"), [(0.6, 2), (0.5, 4), (0.4, 4), (0.34, 4), (0.3, 6), (1.0, 2)])
def test_a_share_is_room_for_so_many_workers_on_two_gpus(share: float, workers: int) -> None:
    eight = Demand("m", tuple(range(8)), GIB, GIB)
    assert len(plan_workers([eight], [node(gpus=2)], limits(gpus=share), device="cuda")) == workers


def test_the_server_and_engines_take_part_in_the_packing() -> None:
    """An engine's 0.3 and the server's 0.4 are on one GPU, which leaves 0.3: room for one worker of 0.6, not two."""
    nodes = [node(gpus=2, gpu_memory=80)]
    engine = Demand("small", (), GIB, GIB)
    _, nodes_left = plan_engines([engine], nodes, threads=1, cpus=0, gpus=0.3, kept_bytes=GIB)
    server, nodes_left = plan_server(nodes_left, memory_bytes=GIB, gpus=0.4)
    assert (server.gpus, nodes_left[0].gpus) == (0.4, (0.3, 1.0))
    assert len(plan_workers([SMALL], nodes_left, limits(gpus=0.6), device="cuda")) == 1


def test_engines_leave_gpus_whole_where_they_can() -> None:
    engines = [Demand(name, (), GIB, GIB) for name in ("x", "y", "z", "u")]
    nodes = [node("a", gpus=1, memory=32), node("b", gpus=2, memory=64)]
    plans, left = plan_engines(engines, nodes, threads=1, cpus=0, gpus=0.3, kept_bytes=0)
    assert [plan.node for plan in plans] == ["b", "b", "b", "b"]
    assert [entry.gpus for entry in left] == [(1.0,), (0.1, 0.7)]


def test_a_server_with_a_share_goes_where_a_gpu_is_and_one_without_stays_with_the_driver() -> None:
    nodes = [node("head"), node("worker", gpus=1)]
    server, left = plan_server(nodes, memory_bytes=GIB, gpus=0.25)
    assert (server.node, [entry.gpus for entry in left]) == ("worker", [(), (0.75,)])
    assert plan_server(nodes, memory_bytes=GIB, gpus=0.0)[0].node == "head"
    with pytest.raises(PlacementError, match=r"resources\.server_gpus = 0\.25 of a GPU free"):
        plan_server([node("head")], memory_bytes=GIB, gpus=0.25)
    with pytest.raises(PlacementError, match=r"the server needs 1\.0 GiB.*resources\.memory_limit_gib"):
        plan_server([node(memory=0.5)], memory_bytes=GIB, gpus=0.0)


def test_ranks_are_placed_before_shares_which_could_take_their_gpus() -> None:
    """By host memory `other` would be first, and go to b, the node with the most of it."""
    other = Demand("other", (2,), host_bytes=9 * GIB, device_bytes=GIB)
    nodes = [node("a", gpus=1, memory=32), node("b", gpus=2, memory=64)]
    plan = plan_workers([LARGE, other], nodes, limits(gpus=0.5), device="cuda")
    assert {worker.model: worker.node for worker in plan} == {"large": "b", "other": "a"}


def test_models_of_one_process_share_its_share_of_one_gpu() -> None:
    first, second = Demand("first", (0,), GIB, 30 * GIB), Demand("second", (1,), GIB, 40 * GIB)
    in_turn = Limits(1, 1.0, 2, one_by_one=True)
    plan = plan_workers([first, second], [node(gpus=1, gpu_memory=80)], in_turn, device="cuda")
    assert [(worker.model, worker.gpus) for worker in plan] == [("first", 1.0), ("second", 1.0)]
    with pytest.raises(PlacementError, match=r"40\.0 GiB for a worker of second do not fit beside the other models"):
        plan_workers(
            [first, second], [node(gpus=1, gpu_memory=80)], replace(in_turn, gpus_per_worker=0.8), device="cuda"
        )


def test_the_reason_is_that_of_the_nodes_that_are_left_when_the_others_are_out_of_question() -> None:
    """The node with a GPU lacks memory; that the other has some is no use."""
    nodes = [node("cpus", memory=64), node("gpu", gpus=1, memory=1)]
    with pytest.raises(PlacementError, match=r"host memory, and the most a node has left is 1\.0 GiB"):
        plan_workers([SMALL], nodes, limits(), device="cuda")


IN_TURN = Limits(1, 0.5, None, one_by_one=True)
TAKES_TURNS = [Demand("first", (0,), GIB, 30 * GIB), Demand("second", (1,), GIB, 20 * GIB)]


@pytest.mark.parametrize(
    ("demands", "given_node", "given_limits", "device", "says"),
    [
        (
            [SMALL],
            node(cpus=2),
            limits(threads=4),
            "cpu",
            "no node has 4 CPU cores for a worker of small; lower resources.threads_per_worker, or use a machine with "
            "more",
        ),
        (
            [SMALL],
            node(memory=1.5),
            limits(),
            "cpu",
            "a worker of small needs 2.0 GiB of host memory, and the most a node has left is 1.5 GiB. Use a smaller "
            "model.name, training.batch_size, generation.batch_size or model.max_length, fewer models in clients.mix, "
            "or raise resources.memory_limit_gib",
        ),
        (
            [SMALL],
            node(gpus=1, memory=1.5),
            limits(),
            "cuda",
            "a worker of small needs 2.0 GiB of host memory, and the most a node has left is 1.5 GiB. Use fewer models "
            "in clients.mix, leave sharding.cpu_offload off, or raise resources.memory_limit_gib",
        ),
        (
            [LARGE],
            node(gpus=1),
            limits(),
            "cuda",
            "no node has 2 GPUs free for the ranks of large; lower its number in sharding.models, or set "
            "resources.device to cpu",
        ),
        (
            [SMALL],
            node(),
            limits(gpus=0.5),
            "cuda",
            "no node has 0.5 of a GPU free for a worker of small; lower resources.gpus_per_worker, "
            "resources.server_gpus or resources.engine_gpus, or set resources.device to cpu",
        ),
        (
            [SMALL],
            node(gpus=1, gpu_memory=1.5),
            limits(gpus=0.5),
            "cuda",
            "1.0 GiB for a worker of small do not fit in resources.gpus_per_worker = 0.5 of any GPU; raise it, or use "
            "a smaller training.batch_size or model.max_length, or divide the model among several GPUs with "
            "sharding.models",
        ),
        (
            [SMALL],
            node(gpus=1, gpu_memory=0.5),
            limits(),
            "cuda",
            "1.0 GiB for a worker of small do not fit in any GPU; use a smaller training.batch_size or "
            "model.max_length, or divide the model among several GPUs with sharding.models",
        ),
        (
            [LARGE],
            node(gpus=2, gpu_memory=4),
            limits(gpus=0.5),
            "cuda",
            "5.0 GiB for a rank of large do not fit in any GPU; use a smaller training.batch_size or model.max_length, "
            "or divide the model among more GPUs with sharding.models",
        ),
        (
            TAKES_TURNS,
            node(gpus=1, gpu_memory=80),
            IN_TURN,
            "cuda",
            "20.0 GiB for a worker of second do not fit beside the other models of clients.mix in "
            "resources.gpus_per_worker = 0.5 of any GPU; raise it, or use a smaller training.batch_size or "
            "model.max_length, or divide the model among several GPUs with sharding.models",
        ),
        (
            TAKES_TURNS[1:],
            node(gpus=1, gpu_memory=30),
            IN_TURN,
            "cuda",
            "20.0 GiB for a worker of second do not fit in resources.gpus_per_worker = 0.5 of any GPU; raise it, or "
            "use a smaller training.batch_size or model.max_length, or divide the model among several GPUs with "
            "sharding.models",
        ),
        (
            models(2, 1),
            node(),
            limits(workers=1),
            "cpu",
            "2 architectures need a worker each, but resources.max_workers is 1",
        ),
    ],
)
def test_the_user_is_told_what_lacks_room_and_all_that_can_be_changed(
    demands: list[Demand], given_node: Node, given_limits: Limits, device: str, says: str
) -> None:
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        plan_workers(demands, [given_node], given_limits, device=device)


@pytest.mark.parametrize(
    ("gpus", "memory", "says"),
    [
        (
            0.25,
            64,
            "no node has resources.server_gpus = 0.25 of a GPU free for the server; lower it or resources.engine_gpus, "
            "or set it to 0: the server then works on the CPU",
        ),
        (
            0.0,
            0.5,
            "the server needs 1.0 GiB of memory, and no node has as much free; raise resources.memory_limit_gib, or "
            "use a machine with more",
        ),
    ],
)
def test_the_user_is_told_what_the_server_lacks(gpus: float, memory: float, says: str) -> None:
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        plan_server([node(memory=memory)], memory_bytes=GIB, gpus=gpus)
    says = (
        "the server needs 1.0 GiB of memory, and no node has as much free with a GPU; raise "
        "resources.memory_limit_gib, or use a machine with more"
    )
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        plan_server([node(), node("b", gpus=1, memory=0.5)], memory_bytes=GIB, gpus=0.25)


def test_the_whole_plan_is_printed() -> None:
    ten = Demand("small", tuple(range(10)), 2 * GIB, GIB)
    plan = plan_workers([ten], [node("a", cpus=2), node("b", cpus=1)], limits(threads=1, workers=2), device="cpu")
    assert describe_plan(plan, "cpu", {"small": ten}).split("\n") == [
        "10 clients on 2 workers, 2 nodes, device cpu",
        "  worker-0 on a: 1 thread, 2.0 GiB, small, clients 0, 2, 4, 6, 8",
        "  worker-1 on b: 1 thread, 2.0 GiB, small, clients 1, 3, 5, 7, 9",
    ]
    plan = plan_workers([ten], [node("a", cpus=2)], limits(threads=2), device="cpu")
    assert describe_plan(plan, "cpu", {"small": ten}).split("\n") == [
        "10 clients on 1 workers, 1 node, device cpu",
        "  worker-0 on a: 2 threads, 2.0 GiB, small, clients 0, 1, 2, 3, 4, 5, 6, 7, ... (10)",
    ]
    nine, eight = (replace(plan[0], clients=ten.clients[first:]) for first in (1, 2))
    assert describe_plan([nine], "cpu", {}).endswith("clients 1, 2, 3, 4, 5, 6, 7, 8, ... (9)")
    assert describe_plan([eight], "cpu", {}).endswith("clients 2, 3, 4, 5, 6, 7, 8, 9")
    plan = plan_workers(models(2, 1), [node("a", cpus=1)], limits(), device="cpu")
    assert describe_plan(plan, "cpu", {}).split("\n") == [
        "2 clients on 2 workers, 1 node, device cpu",
        "  models are more than cores: 2 workers share cores, and each is slower for it",
        "  worker-0 on a: 1 thread sharing cores (0.5), 2.0 GiB, a, clients 0",
        "  worker-1 on a: 1 thread sharing cores (0.5), 1.0 GiB, b, clients 1",
    ]
    plan = plan_workers([SMALL], [node("a", gpus=1, gpu_memory=8)], limits(gpus=0.25, workers=1), device="cuda")
    assert describe_plan(plan, "cuda", {"small": SMALL}).split("\n") == [
        "4 clients on 1 workers, 1 node, device cuda",
        "  worker-0 on a: 0.25 GPU, 2.0 GiB + 1.0 GiB of the GPU, small, clients 0, 1, 2, 3",
    ]
    plan = plan_workers([LARGE], [node("a", gpus=2, gpu_memory=8)], limits(), device="cuda")
    assert describe_plan(plan, "cuda", {"large": LARGE}).split("\n") == [
        "2 clients on 1 workers, 1 node, device cuda",
        "  worker-0 on a: 2 ranks of 1 GPU, 6.0 GiB + 5.0 GiB of each GPU, large, clients 0, 1",
    ]


def test_the_server_takes_its_part_of_its_node_and_leaves_the_others() -> None:
    nodes = [node("x"), replace(node("y", gpus=2), gpu_watts=300.0), node("z")]
    plan, left = plan_server(nodes, memory_bytes=4 * GIB, gpus=0.25)
    assert plan == ServerPlan("y", "y", 0.25, 300.0)
    assert left == (nodes[0], replace(nodes[1], gpus=(0.75, 1.0), memory_bytes=60 * GIB), nodes[2])


def test_a_limit_of_memory_is_the_most_that_counts() -> None:
    here = node(gpus=1, memory=8)
    assert here.limited(3 * GIB) == replace(here, memory_bytes=3 * GIB)
    assert here.limited(9 * GIB) == here


def test_room_that_is_just_enough_is_enough() -> None:
    """3 + 2 + 1 GiB and the server's one on two cores; and memory of a GPU, and of the server's node."""
    plan = plan_with_server(models(3, 2, 1), [node(cpus=2, memory=7)], limits(), device="cpu")
    assert [worker.memory_bytes // GIB for worker in plan] == [3, 2, 1]
    assert len(plan_workers([SMALL], [node(gpus=1, gpu_memory=2, memory=2)], limits(gpus=0.5), device="cuda")) == 1
    assert plan_server([node(memory=1)], memory_bytes=GIB, gpus=0.0)[1][0].memory_bytes == 0


CPU_BUILD = "torch 2.13.0+cpu is built without CUDA"


def test_gpus_are_used_where_torch_can_use_them() -> None:
    good, bad, none = node("good", gpus=1), replace(node("bad", gpus=2), cuda_fault=CPU_BUILD), node("none")
    faulty = replace(none, cuda_fault=CPU_BUILD)  # as any machine without a GPU
    assert choose_device("auto", [none, bad]) == "cpu"
    assert choose_device("auto", [bad, good]) == "cuda"
    assert choose_device("cuda", [bad, good]) == "cuda"
    assert choose_device("cpu", [good]) == "cpu"
    says = "resources.device is cuda, but no node has a GPU, or CUDA_VISIBLE_DEVICES hides it; set it to auto or cpu"
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        choose_device("cuda", [faulty])
    says = (
        f"resources.device is cuda, but on bad {CPU_BUILD}; install a torch built for the CUDA of its driver there, or "
        "set resources.device to auto or cpu"
    )
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        choose_device("cuda", [none, bad])
    assert unused_gpus("auto", [good, bad, faulty]) == [f"  GPUs of bad are not used: {CPU_BUILD}"]
    assert unused_gpus("cpu", [bad]) == []


class RaysGpus:
    """Where Ray puts shares: whole ones on free GPUs, a part where the least is left. In steps of 1/10,000."""

    def __init__(self, count: int) -> None:
        self.left = [10_000] * count

    def takes(self, share: float) -> int | None:
        """Index of the GPU, if one has room."""
        steps = round(share * 10_000)
        room = [(left - steps, index) for index, left in enumerate(self.left) if left >= steps]
        if not room:
            return None
        index = min(room)[1]
        self.left[index] -= steps
        return index


shares = st.sampled_from([1.0, 0.75, 0.6, 0.5, 0.4, 1 / 3, 0.3, 0.25, 0.2, 0.1]) | st.integers(500, 10_000).map(
    lambda steps: steps / 10_000
)
gpu_nodes = st.lists(
    st.tuples(st.integers(0, 4), st.integers(6, 24), st.sampled_from([None, 8, 24, 80])), min_size=1, max_size=4
)
models_on_gpus = st.lists(
    st.tuples(st.integers(1, 7), st.sampled_from([1, 1, 1, 2]), st.integers(1, 12)), min_size=1, max_size=3
)


@settings(max_examples=300)
@given(
    gpu_nodes=gpu_nodes,
    models_on_gpus=models_on_gpus,
    worker=shares,
    server=st.just(0.0) | shares,
    engine=st.none() | shares,
    most=st.none() | st.integers(1, 9),
    random=st.randoms(use_true_random=False),
)
def test_what_is_planned_on_gpus_can_be_packed_and_nothing_more_would_fit(
    gpu_nodes: list[tuple[int, int, int | None]],
    models_on_gpus: list[tuple[int, int, int]],
    worker: float,
    server: float,
    engine: float | None,
    most: int | None,
    random: object,
) -> None:
    nodes = [node(f"n{i}", gpus=count, memory=gib, gpu_memory=gpu) for i, (count, gib, gpu) in enumerate(gpu_nodes)]
    sizes = [size for size, _, _ in models_on_gpus]
    demands = [
        Demand(f"m{i}", tuple(range(sum(sizes[:i]), sum(sizes[: i + 1]))), ranks * GIB, gib * GIB, ranks)
        for i, (_, ranks, gib) in enumerate(models_on_gpus)
    ]
    wanted = limits(gpus=worker, workers=most)
    engines = []
    try:
        left: Sequence[Node] = nodes
        if engine is not None:
            engines, left = plan_engines(
                [Demand(demand.model, (), GIB, 2 * GIB) for demand in demands],
                nodes, threads=1, cpus=0, gpus=engine, kept_bytes=GIB,
            )  # fmt: skip
        home, left = plan_server(left, memory_bytes=GIB, gpus=server)
        plan = plan_workers(demands, left, wanted, device="cuda")
    except PlacementError:
        event("refused")
        return
    event(f"{len(plan)} workers")
    assert sorted(client for entry in plan for client in entry.clients) == list(range(sum(sizes)))

    # As they are started: engines, the server, and workers in any order.
    gpus = {entry.node_id: RaysGpus(len(entry.gpus)) for entry in nodes}
    held = {entry.node_id: [0] * len(entry.gpus) for entry in nodes}
    needs = {demand.model: demand for demand in demands}
    started = [(entry.node_id, entry.gpus, entry.device_bytes) for entry in engines]
    started += [(home.node_id, home.gpus, 0)] if server else []
    workers = [
        (entry.node_id, entry.gpus, needs[entry.model].device_bytes) for entry in plan for _ in range(entry.ranks)
    ]
    random.shuffle(workers)  # type: ignore[attr-defined]
    for where, share, device_bytes in [*started, *workers]:
        index = gpus[where].takes(share)
        assert index is not None, "Ray has no room for it"
        held[where][index] += device_bytes
    memory = {entry.node_id: entry.memory_bytes for entry in nodes}
    memory[home.node_id] -= GIB
    for entry in (*engines, *plan):
        memory[entry.node_id] -= entry.memory_bytes
    assert all(free >= 0 for free in memory.values())
    limit = {entry.node_id: entry.gpu_memory_bytes for entry in nodes}
    assert all(limit[where] is None or used <= limit[where] for where, each in held.items() for used in each)

    if most is not None and len(plan) >= most:
        assert len(plan) == most
        return
    for demand in demands:
        if sum(entry.model == demand.model for entry in plan) == len(demand.clients):
            continue
        for entry in nodes:
            trial = RaysGpus(0)
            trial.left = list(gpus[entry.node_id].left)
            share = in_steps(worker) if demand.ranks == 1 else 1.0
            fits = all(trial.takes(share) is not None for _ in range(demand.ranks))
            fits &= entry.gpu_memory_bytes is None or demand.device_bytes <= entry.gpu_memory_bytes * share
            assert not (fits and memory[entry.node_id] >= demand.host_bytes), "one more worker would have fitted"
