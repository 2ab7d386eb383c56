import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from semcons_ray.distributed import cluster, ray_fleet
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.ray_fleet import RayFleet
from semcons_ray.distributed.worker import Arrival
from semcons_ray.errors import ClientError, ModelError, QuorumError
from semcons_ray.federation.store import mark
from semcons_ray.metering.ledger import Place
from semcons_ray.tracking.run_log import run_log
from tests.distributed.fakes import FakeSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@ray.remote
class DiesAtStart:
    """As a worker that Ray starts on a node that is just being lost."""

    def __init__(self, variables: Mapping[str, str], code: Mapping[str, bytes]) -> None:
        ray.actor.exit_actor()

    def arrive(self, uses_gpu: bool, folder: Path, mark: str) -> Arrival:
        return Arrival(Place(""), True)

    def load(self, spec: FakeSpec, worker: str) -> None: ...


@dataclass
class DyingWorkers:
    """In the place of `WorkerActor`: the first `times` die when they start."""

    times: int
    living: Any = ray_fleet.WorkerActor

    def options(self, **options: Any) -> Any:
        self.times -= 1
        return (DiesAtStart if self.times >= 0 else self.living).options(**options)  # type: ignore[attr-defined]


MakeFleet = Callable[..., RayFleet]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[cluster.Node, ...]]:
    with cluster.connect(None):
        yield cluster.list_nodes()


@pytest.fixture
def make_fleet(nodes: tuple[cluster.Node, ...], tmp_path: Path) -> Iterator[MakeFleet]:
    made: list[RayFleet] = []

    def make(
        *clients: tuple[int, ...],
        timeout: float = 60.0,
        quorum: float = 0.5,
        shared_cpus: float | None = None,
        one_model: bool = False,
        sizes: tuple[int, ...] | None = None,
        sees_folder: bool = True,
        train_together: int = 1,
        **trouble: Any,
    ) -> RayFleet:
        models = ["m" if one_model else f"m{i}" for i in range(len(clients))]
        plans = [
            WorkerPlan(f"worker-{i}", nodes[0].node_id, nodes[0].name, models[i], ids, 1, 0.0, 0, shared_cpus)
            for i, ids in enumerate(clients)
        ]
        visits = tmp_path / "visits"
        visits.mkdir(exist_ok=True)
        specs = {plan.model: FakeSpec(visits, **trouble) for plan in plans}
        state = tmp_path / "state"
        name = mark(state) if sees_folder else ".mark-elsewhere"
        made.append(
            RayFleet(
                plans, specs, timeout_seconds=timeout, max_restarts=1, quorum=quorum, uses_gpu=False, sizes=sizes,
                state=state, mark=name, train_together=train_together,
            )
        )  # fmt: skip
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def uplinks(fleet: RayFleet, round: int = 1) -> dict[int, bytes]:
    clients = [client for worker in fleet._workers.values() for client in worker.plan.clients]
    downlinks = {client: b"hello %d " % (client % 2) for client in clients}
    return {reply.client_id: reply.uplink for reply in fleet.visit(round, downlinks, evaluate=False)}


def test_every_client_is_visited_once_with_its_own_message(make_fleet: MakeFleet, tmp_path: Path) -> None:
    assert uplinks(make_fleet((0, 2, 4), (1, 3))) == {c: b"hello %d %d" % (c % 2, c) for c in range(5)}
    assert sorted(path.name for path in (tmp_path / "visits").iterdir()) == [f"{client}-1-0" for client in range(5)]


def test_workers_of_one_model_take_over_clients_that_are_left_and_those_with_the_most_data_come_first(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    """Client 4 hangs until it is given up; meanwhile the other worker visits all others but the one sent with it."""
    sizes = (5, 1, 2, 3, 9, 4)
    fleet = make_fleet((0, 1, 2, 3, 4), (5,), one_model=True, sizes=sizes, troubles={4: "hang"}, times=9, timeout=15.0)
    began = time.time()
    assert sorted(uplinks(fleet)) == [0, 1, 2, 3, 5]
    visited = {path.name[0]: path.stat().st_mtime - began for path in (tmp_path / "visits").glob("*-1-0")}
    assert max(visited[client] for client in "1235") < 12
    assert visited["0"] > 12  # the second largest was sent with it


def test_clients_that_train_together_go_to_one_worker_in_groups_of_the_plan_and_alone_after_a_death(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    """Groups by size of the clients; the worker that dies at its first group visits all that it had alone."""
    sizes = (1, 2, 3, 4, 5, 6, 7, 8)
    fleet = make_fleet(tuple(range(5)), (5, 6, 7), sizes=sizes, train_together=2, troubles={4: "die"})
    assert uplinks(fleet) == {c: b"hello %d %d" % (c % 2, c) for c in range(8)}
    asked = {path.name: path.read_text() for path in (tmp_path / "visits").iterdir()}
    assert asked.pop("4-1-0") == "3"
    assert asked.pop("7-1-0") == "6"
    assert asked.pop("5-1-0") == ""  # is left over
    assert asked["4-1-1"] == asked["3-1-0"] == ""
    assert [*fleet.measure(1, {7: b"", 6: b""})]
    assert not any((tmp_path / "visits" / name).read_text() for name in ("7-1-1", "6-1-1"))


def test_a_worker_that_does_not_see_the_folder_keeps_the_files_of_a_group(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    fleet = make_fleet((0, 1), sees_folder=False, train_together=2)
    assert sorted(uplinks(fleet)) == [0, 1]
    assert (tmp_path / "visits" / "0-1-0").read_text() == "1"
    written = {path.parent.name: path.read_bytes() for path in (tmp_path / "state").rglob("round_*")}
    assert written == {"client_000": b"x", "client_001": b"kx"}


def at_hand(fleet: RayFleet, downlinks: Mapping[int, bytes]) -> list[int]:
    """How many clients the worker that had most was sent and not done with, at each reply."""
    replies = fleet.visit(1, downlinks, evaluate=False)
    return [max(len(worker.clients) for worker in fleet._workers.values()) for _ in replies]


def test_quick_visits_are_sent_in_lots_and_each_round_begins_with_two(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(tuple(range(50)), tuple(range(50, 100)), one_model=True)
    for _ in range(2):
        most = at_hand(fleet, dict.fromkeys(range(100), b""))
        assert len(most) == 100
        assert most[0] == 2
        assert 2 < max(most) <= ray_fleet.MOST_AHEAD


def test_at_most_one_client_waits_behind_a_long_visit_and_none_at_the_end(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(tuple(range(16)), (16, 17, 18, 19), one_model=True, seconds=0.2)
    most = at_hand(fleet, dict.fromkeys(range(20), b""))
    assert max(most) == 2
    assert max(most[-4:]) == 1


def test_small_messages_go_with_the_calls_and_large_ones_into_the_object_store(make_fleet: MakeFleet) -> None:
    fleet = make_fleet((0, 1))
    small, large = b"s" * ray_fleet.SENT_DIRECTLY_BYTES, b"l" * (ray_fleet.SENT_DIRECTLY_BYTES + 1)
    assert ray_fleet._sent(small) is small
    assert isinstance(ray_fleet._sent(large), ray.ObjectRef)
    replies = fleet.visit(1, {0: small, 1: large}, evaluate=False)
    assert {reply.client_id: reply.uplink for reply in replies} == {0: small + b"0", 1: large + b"1"}


def test_a_queue_is_gone_through_in_its_order_and_the_longest_one_is_taken_from() -> None:
    first, second, third = "first", "second", "third"
    waiting = ray_fleet._Waiting([first, second, third])  # type: ignore[list-item]
    for worker, groups in ((first, [(4,), (2,)]), (second, [(7,), (1,), (3,), (5, 6)])):
        waiting.add(worker, groups)  # type: ignore[arg-type]
    waiting.add(first, [(9,), (8,)], first=True)  # type: ignore[arg-type]
    assert (len(waiting), waiting.half_share) == (8, 2)
    taken = [waiting.next_for(worker) for worker in (first, third, third, second, third)]  # type: ignore[arg-type]
    assert taken == [(9,), (7,), (8,), (1,), (4,)]
    assert waiting.half_share == 1
    assert waiting.take_all() == [2, 3, 5, 6]
    assert (len(waiting), waiting.half_share) == (0, 0)


def test_clients_of_a_worker_without_room_are_visited_by_others_of_its_model(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet((0, 2), (1, 3), one_model=True, quorum=1.0)
    monkeypatch.setattr(ray_fleet, "WorkerActor", DyingWorkers(10**6))
    ray.kill(fleet._workers["worker-1"].actor)
    assert sorted(uplinks(fleet)) == [0, 1, 2, 3]
    assert fleet.lost == {}


def test_where_the_folder_is_not_seen_files_travel_with_visits(make_fleet: MakeFleet, tmp_path: Path) -> None:
    fleet = make_fleet((0, 1), sees_folder=False)
    for round in (1, 2, 3):
        assert sorted(uplinks(fleet, round)) == [0, 1]
    of_client = {path.name: path.read_bytes() for path in (tmp_path / "state" / "client_001").iterdir()}
    assert of_client == {"round_001.safetensors": b"xx", "round_002.safetensors": b"xxxx"}  # two are kept
    list(fleet.measure(3, {1: b""}))
    fleet.export_adapters(4, {1: b"one"}, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "client_001" / "who").read_text() == "1 4 one"


def test_the_first_adapter_is_a_workers_to_the_last_bit(make_fleet: MakeFleet) -> None:
    assert make_fleet((0,), (1,)).first_adapter["lora_A"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_workers_that_share_cores_all_start(make_fleet: MakeFleet, nodes: tuple[cluster.Node, ...]) -> None:
    """One more worker than cores; without shares the last would wait for a core for ever."""
    count = int(nodes[0].cpus) + 1
    share = nodes[0].cpus * 10_000 // count / 10_000
    fleet = make_fleet(*((client,) for client in range(count)), shared_cpus=share)
    assert sorted(uplinks(fleet)) == list(range(count))


@pytest.mark.parametrize("trouble", ["die", "fail"])
def test_a_worker_that_dies_once_is_replaced_and_no_answer_is_lost(make_fleet: MakeFleet, trouble: str) -> None:
    fleet = make_fleet((0, 1, 2), (3,), troubles={1: trouble})
    assert sorted(uplinks(fleet)) == [0, 1, 2, 3]
    assert sorted(uplinks(fleet, round=2)) == [0, 1, 2, 3]


def test_a_client_that_keeps_dying_is_left_out_and_its_companions_are_not(make_fleet: MakeFleet) -> None:
    assert sorted(uplinks(make_fleet((0, 1, 2), (3,), troubles={1: "die"}, times=9))) == [0, 2, 3]


def test_a_client_that_diverges_is_left_out_at_once_and_its_worker_goes_on(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    fleet = make_fleet((0, 1, 2), (3,), troubles={1: "diverge"}, times=9)
    actor = fleet._workers["worker-0"].actor
    assert sorted(uplinks(fleet)) == [0, 2, 3]
    assert fleet.lost == {1: "its training loss is nan"}
    assert len(list((tmp_path / "visits").glob("1-1-*"))) == 1
    assert fleet._workers["worker-0"].actor is actor
    assert sorted(uplinks(fleet, round=2)) == [0, 2, 3]


def test_a_slow_client_is_given_up_within_its_time(make_fleet: MakeFleet) -> None:
    # Long enough for the replacement to start, short beside the hour that the visit would take.
    assert sorted(uplinks(make_fleet((0, 1), troubles={0: "hang"}, times=9, timeout=15.0))) == [1]


def test_too_few_answers_end_the_round_with_the_reasons(make_fleet: MakeFleet) -> None:
    fleet = make_fleet((0, 1), troubles={0: "fail"}, times=9, quorum=0.75)
    with pytest.raises(QuorumError, match=r"round 1: 1 of 2 clients answered.*client 0: .*out of luck"):
        uplinks(fleet)


def test_what_the_user_must_mend_is_not_retried(make_fleet: MakeFleet, tmp_path: Path) -> None:
    fleet = make_fleet((0,), troubles={0: "refuse"}, times=9)
    with pytest.raises(ModelError, match=r"^change model\.name$"):
        uplinks(fleet)
    assert len(list((tmp_path / "visits").iterdir())) == 1


def test_a_model_that_does_not_load_says_so(make_fleet: MakeFleet) -> None:
    with pytest.raises(ModelError, match=r"^cannot load model nothing$"):
        make_fleet((0,), loads=False)


def test_adapters_are_exported_even_by_a_worker_that_died(make_fleet: MakeFleet, tmp_path: Path) -> None:
    fleet = make_fleet((0, 1))
    ray.kill(fleet._workers["worker-0"].actor)
    fleet.export_adapters(3, {0: b"zero", 1: b"one"}, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "client_001" / "who").read_text() == "1 3 one"


def test_measuring_asks_only_those_named_and_survives_a_death_too(make_fleet: MakeFleet) -> None:
    fleet = make_fleet((0, 1), (2,), troubles={1: "die"})
    replies = {reply.client_id: reply.uplink for reply in fleet.measure(1, {1: b"adapter ", 2: b"adapter "})}
    assert replies == {1: b"measured adapter 1", 2: b"measured adapter 2"}


def test_workers_started_on_a_node_that_is_being_lost_do_not_count_as_tries(
    make_fleet: MakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet((0, 1))
    monkeypatch.setattr(ray_fleet, "WorkerActor", DyingWorkers(2))
    ray.kill(fleet._workers["worker-0"].actor)
    assert sorted(uplinks(fleet)) == [0, 1]
    monkeypatch.setattr(ray_fleet, "WorkerActor", DyingWorkers(2))
    ray.kill(fleet._workers["worker-0"].actor)
    fleet.export_adapters(3, {0: b"zero", 1: b"one"}, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "client_001" / "who").read_text() == "1 3 one"


def test_a_worker_that_dies_whenever_it_starts_is_left_out_in_time(
    make_fleet: MakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet((0,), (1, 2), quorum=0.3)
    fleet._room_timeout_seconds = fleet._timeout_seconds = 2
    monkeypatch.setattr(ray_fleet, "WorkerActor", DyingWorkers(10**6))
    ray.kill(fleet._workers["worker-1"].actor)
    assert sorted(uplinks(fleet)) == [0]
    assert sorted(uplinks(fleet, round=2)) == [0]
    with pytest.raises(ClientError, match=r"^the adapter of client 1 was not written: no node had room for worker-1 "):
        fleet.export_adapters(3, {0: b"zero", 1: b"one"}, tmp_path / "adapters")


def test_what_workers_log_is_in_the_runs_log_even_if_they_die(make_fleet: MakeFleet, tmp_path: Path) -> None:
    with run_log(tmp_path / "run.log", "driver"):
        uplinks(make_fleet((0, 1), (2,), troubles={0: "die", 2: "fail"}))
    log = (tmp_path / "run.log").read_text()
    said = re.findall(r"INFO (worker-\d)@\S+ semcons_ray.fakes: visits client (\d), attempt (\d)", log)
    assert sorted(said) == [
        ("worker-0", "0", "0"), ("worker-0", "0", "1"), ("worker-0", "1", "0"), ("worker-1", "2", "0"),
        ("worker-1", "2", "1"),
    ]  # fmt: skip
    assert "RuntimeError: out of luck" in log
    assert 'raise RuntimeError("out of luck")' in log  # its traceback
