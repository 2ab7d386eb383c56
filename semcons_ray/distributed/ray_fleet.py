"""`RayFleet`: visits clients in Ray actors. All workers work at the same time, each on one client after the other.

Each worker begins with the clients that it has by the plan, those with the most data first. One that has no more of
them goes on with the clients of another worker of its model that has the most left, so that all workers are busy to the
end of a round, whoever takes part and however long visits take. Nothing of a client stays in a worker between visits.

A worker that dies, or whose visit takes too long, is replaced. The visit that it was at is tried again up to a limit,
and then its client is left out of the round. The work of a visit counts exactly once (see federation/store.py), so
repeating a visit costs time and changes nothing.

Clients that train together (`training.train_together`) wait in groups, which the plan decides. The visit of a group's
first does those of all, whose replies the worker then gives when they are asked for. If it dies at that, each is
visited alone.

A worker that does not see the run's folder, as on a node without a common file system, is sent the files of a client's
state with a visit, and the driver writes those that come back.

A worker whose node is lost is replaced on another node. If none has room, it waits for the rest of the round, while
others take its clients. Clients of a model none of whose workers has room for `room_timeout_seconds` are left out. It
keeps waiting in the following rounds, without delaying them, until a node joins.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from semcons_ray.data.examples import Example
from semcons_ray.distributed.cluster import NO_CODE, actor_options, passed_on
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.rank_group import RankGroup, make_room
from semcons_ray.distributed.worker import Answer, Arrival, WorkerActor
from semcons_ray.errors import (
    ClientError,
    NotFiniteError,
    PlacementError,
    UnansweredError,
    UserError,
    first_line,
)
from semcons_ray.federation.fleet import (
    NO_EXAMPLES,
    HostSpecProtocol,
    Reply,
    check_quorum,
    client_folder,
    in_groups,
)
from semcons_ray.federation.store import ClientStore, write_file
from semcons_ray.federation.weights import unpack
from semcons_ray.metering.energy import EnergyWindow
from semcons_ray.metering.ledger import Place
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.parts import read_code
from semcons_ray.tracking.run_log import append_to_log

logger = logging.getLogger(__name__)

_REPLY = msgspec.msgpack.Decoder(Reply)

SENT_DIRECTLY_BYTES = 32 << 10
"""Messages up to this size go with each call, larger ones into the object store once. A worker took 0.4 ms longer to
fetch one from there than to receive it with the call (4 to 32 KiB, two cores), more than 1 Gbit/s takes for 32 KiB."""

MOST_AHEAD = 16
QUICK_SECONDS = 0.01
"""A worker may have two clients at hand, so that it need not wait for the driver, and after each visit that took less
than `QUICK_SECONDS` twice as many as before, up to `MOST_AHEAD`: calls in lots cost least. After a longer visit, or
when it has none at hand, it is two again, so that no backlog waits behind long visits while other workers are free."""


class _Worker:
    """One actor, and what it is made from.

    Attributes:
        clients: Clients that it was sent; the first is the one at which it works.
        refs: References to their replies, in the same order.
        visits: How many visits each of these calls may do: those of a group for its first, else one.
        ahead: How many clients it may have been sent, at most `most_ahead`; see `MOST_AHEAD`.
        place: Where it was last seen.
        sees_folder: Whether it sees the folder of clients' states.
        is_far: Whether it is on another node than the driver.
        has_room: Whether its process is running; if not, the cluster may have no room for it.
        room: The placement group of its ranks, if it has several.
        since: When it began its current visit, or to wait for room, by the monotonic clock.
        is_stopped: Whether it was stopped for good.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        spec_ref: ray.ObjectRef[Any],
        variables: Mapping[str, str],
        code: Mapping[str, bytes],
        marked: tuple[Path, str],
        most_ahead: int,
    ) -> None:
        self.plan = plan
        self.most_ahead = most_ahead
        self.spec_ref = spec_ref
        self.variables = variables
        self.code = code
        self.marked = marked
        self.sees_folder = True
        self.clients: deque[int] = deque()
        self.refs: deque[ray.ObjectRef[Any]] = deque()
        self.visits: deque[int] = deque()
        self.place = Place(plan.node)
        self.has_room = True
        self.is_stopped = False
        self.is_far = plan.node_id != ray.get_runtime_context().get_node_id()
        self.room: PlacementGroup | None = None
        self.start()

    def start(self) -> None:
        """Start the actor and have it load."""
        plan, variables = self.plan, self.variables
        options = actor_options(node_id=plan.node_id, threads=plan.threads, num_cpus=plan.num_cpus, num_gpus=plan.gpus)
        if plan.ranks == 1:
            self.actor = WorkerActor.options(**options).remote(variables, self.code)  # type: ignore[attr-defined]
        else:  # the group only watches; its ranks take the cores and GPUs
            self.room = make_room(plan)
            options |= {"num_cpus": 0, "num_gpus": 0}
            self.actor = RankGroup.options(**options).remote(plan, self.room, variables, self.code)  # type: ignore[attr-defined]
        self.arrival_ref = self.actor.arrive.remote(plan.gpus > 0, *self.marked)
        self.load_ref = self.actor.load.remote(self.spec_ref, plan.name)
        if self.has_room:  # the waiting time of a worker that waits for room already goes on
            self.since = time.monotonic()
        self.has_room = self.is_stopped = False
        self.ahead = 2

    @property
    def awaited_ref(self) -> ray.ObjectRef[Any]:
        """Reference to what it will return next."""
        return self.refs[0] if self.has_room else self.arrival_ref

    def arrived(self, arrival: Arrival) -> None:
        """Note that its process is running."""
        self.place, self.sees_folder = arrival
        self.has_room = True

    def send(self, client: int, ref: ray.ObjectRef[Any], visits: int) -> None:
        """Note a client that it was sent, the reference to the reply, and how many visits the call may do."""
        if not self.clients:
            self.since = time.monotonic()
        self.clients.append(client)
        self.refs.append(ref)
        self.visits.append(visits)
        if self.is_far:
            ref.future()  # fetches it as soon as it is there; `ray.wait` fetches from one node after the other

    def done(self) -> int:
        """The client at which it worked, and is not any more."""
        now = time.monotonic()
        took, self.since = now - self.since, now
        self.refs.popleft()
        self.visits.popleft()
        client = self.clients.popleft()
        self.ahead = min(2 * self.ahead, self.most_ahead) if self.clients and took < QUICK_SECONDS else 2
        return client

    def replace(self) -> None:
        """Kill the actor if it is alive, and start another, which has been sent nothing."""
        self.clients.clear()
        self.refs.clear()
        self.visits.clear()
        self.stop()
        self.start()

    def stop(self) -> None:
        """Kill the actor, and its ranks if it has several."""
        self.is_stopped = True
        ray.kill(self.actor, no_restart=True)
        if self.room is not None:
            remove_placement_group(self.room)


def _sent(message: bytes) -> bytes | ray.ObjectRef[bytes]:
    """A message as it is sent with calls: itself, or a reference to it."""
    return message if len(message) <= SENT_DIRECTLY_BYTES else ray.put(message)


class _Waiting:
    """Clients of a model that are still to be visited in a round, in a queue for each of its workers: in groups, of
    which most are of one."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._queues: dict[_Worker, deque[tuple[int, ...]]] = {worker: deque() for worker in workers}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def half_share(self) -> int:
        """Half of a worker's share of them. As long as no worker takes more at once, the last ones go to whoever is
        free first (Hummel et al. 1992, "Factoring", doi:10.1145/135226.135232)."""
        return ceil(len(self) / (2 * len(self._queues)))

    def add(self, worker: _Worker, groups: Sequence[tuple[int, ...]], *, first: bool = False) -> None:
        """Add groups to the queue of a worker: behind the others, or before them."""
        if first:
            self._queues[worker].extendleft(reversed(groups))
        else:
            self._queues[worker].extend(groups)

    def next_for(self, worker: _Worker) -> tuple[int, ...]:
        """Take out the group that a worker is to visit: the first of its own, or of the longest queue."""
        own = self._queues[worker]
        return (own or max(self._queues.values(), key=len)).popleft()

    def take_all(self) -> list[int]:
        """Take out all clients, ascending."""
        clients = sorted(client for queue in self._queues.values() for group in queue for client in group)
        for queue in self._queues.values():
            queue.clear()
        return clients


class RayFleet:
    """Clients on Ray actors; see `Fleet` for its methods.

    Args:
        plans: Placement of each worker.
        specs: What workers build their hosts from, by model.
        timeout_seconds: A visit that takes longer is given up, and tried again by a new worker.
        max_restarts: How often a visit is tried again in a round.
        quorum: Share of the clients visited that must answer, 0 to 1.
        uses_gpu: Whether GPUs are metered.
        room_timeout_seconds: How long a round waits for a worker for which the cluster has no room.
        code: Folder with the code of parts of one's own, if there is any.
        state: Folder of clients' states.
        mark: Name of the file by which the driver marked it; see `store.mark`.
        sizes: How much data each client has, by its id, in any unit: those with the most are visited first. None: it is
            not known.
        train_together: How many clients of a worker train together.

    Raises:
        UserError: There was no room for a worker, or it could not load its model; the message says what to change.
        ClientError: A worker died while it was loading.
    """

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        specs: Mapping[str, HostSpecProtocol],
        *,
        timeout_seconds: float,
        max_restarts: int,
        quorum: float,
        uses_gpu: bool,
        room_timeout_seconds: float = 300.0,
        code: Path | None = None,
        state: Path,
        mark: str,
        sizes: Sequence[int] | None = None,
        train_together: int = 1,
    ) -> None:
        spec_refs = {model: ray.put(spec) for model, spec in specs.items()}  # once for all workers, if it is large
        variables = {model: passed_on(spec.environment, code) for model, spec in specs.items()}
        files = read_code(code) if code else NO_CODE
        # The replies of a group come at once, which says nothing of how long other visits take.
        most_ahead, marked = MOST_AHEAD if train_together == 1 else 2, (state.resolve(), mark)
        self._workers = {
            plan.name: _Worker(plan, spec_refs[plan.model], variables[plan.model], files, marked, most_ahead)
            for plan in plans
        }
        self._store = ClientStore(state)
        self._sizes = sizes
        self._train_together = train_together
        self._timeout_seconds = timeout_seconds
        self._max_restarts = max_restarts
        self._quorum = quorum
        self._uses_gpu = uses_gpu
        self._room_timeout_seconds = room_timeout_seconds
        self._metering: dict[str, _Worker] = {}
        self.lost: Mapping[int, str] = {}
        self._num_asked = 0
        for worker in self._workers.values():
            self._await_room(worker, room_timeout_seconds)
            self.adapter_shapes = self._get(worker.load_ref, f"{worker.plan.name} while it was loading")
        self.meters = {node: ray.get(ref) for node, ref in self._start_meters().items()}

    @property
    def workers(self) -> dict[str, Place]:
        """See `Fleet.workers`."""
        return {name: worker.place for name, worker in self._workers.items()}

    @property
    def first_adapter(self) -> Adapter:
        """See `Visitor.first_adapter`."""
        worker = next(iter(self._workers.values()))
        return unpack(self._get(worker.actor.first_adapter.remote(), worker.plan.name))

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """See `Fleet.visit`."""
        return self._ask(round, downlinks, "visit", lambda client: (evaluate,), self._train_together)

    def measure(
        self, round: int, downlinks: Mapping[int, bytes], examples: Mapping[int, Sequence[Example]] = NO_EXAMPLES
    ) -> Iterator[Reply]:
        """See `Fleet.measure`."""
        return self._ask(round, downlinks, "measure", lambda client: (examples.get(client, ()),))

    def _ask(
        self,
        round: int,
        downlinks: Mapping[int, bytes],
        method: str,
        further: Callable[[int], tuple[Any, ...]],
        together: int = 1,
    ) -> Iterator[Reply]:
        """Replies of clients, see `_answers`."""
        for client, answer in self._answers(round, downlinks, method, further, together):
            self._store.put(client, answer.files)
            yield _REPLY.decode(answer.reply)
        check_quorum(round, self._num_asked, self.lost, self._quorum)

    def _answers(
        self,
        round: int,
        downlinks: Mapping[int, bytes],
        method: str,
        further: Callable[[int], tuple[Any, ...]],
        together: int = 1,
        idle: Callable[[_Worker], None] = lambda worker: None,
    ) -> Iterator[tuple[int, Answer]]:
        """What actors return for each client; clients that are given up are in `lost`. An actor runs its calls in
        order, so only the first of each is watched.

        Args:
            round: The round.
            downlinks: The clients, each with its message.
            method: What is asked of an actor, with a client, the round, the client's message, and what follows.
            further: Further arguments for a client.
            together: How many clients of a worker are a group.
            idle: Is called with a worker for which nothing is left to do.
        """
        messages = {message: _sent(message) for message in set(downlinks.values())}
        attempts: Counter[int] = Counter()
        lost: dict[int, str] = {}
        self.lost, self._num_asked = lost, len(downlinks)
        waiting = self._waiting(downlinks, together)

        def fill(worker: _Worker) -> None:
            """Send a worker as many clients as it may have."""
            left = waiting[worker.plan.model]
            room = min(worker.ahead, left.half_share)
            while len(worker.clients) < room:
                group = left.next_for(worker)
                files = {client: None if worker.sees_folder else self._store.files(client) for client in group}
                for client in group:
                    arguments = (client, round, messages[downlinks[client]], *further(client), files[client])
                    beside = {other: files[other] for other in group[1:]} if client == group[0] else {}
                    if beside:  # references are only followed if they are arguments themselves
                        arguments += (beside, *(messages[downlinks[other]] for other in beside))
                    ref = getattr(worker.actor, method).remote(*arguments)
                    worker.send(client, ref, 1 + len(beside))
            if not worker.clients:
                idle(worker)

        def replace(worker: _Worker, reason: str) -> None:
            clients = [*worker.clients]
            if clients:  # else it died before it had room: Ray may start one on a node just being lost
                first = clients[0]
                attempts[first] += 1
                logger.warning("round %d, client %d, attempt %d: %s", round, first, attempts[first], reason)
                if attempts[first] > self._max_restarts:
                    lost[first] = reason
                    clients.remove(first)
            else:
                logger.warning("round %d: %s", round, reason)
            self._replace(worker)
            waiting[worker.plan.model].add(worker, in_groups(clients, 1), first=True)

        def leave_out(worker: _Worker) -> None:
            reason = f"no node had room for {worker.plan.name} in the round's time and failures.room_timeout_seconds"
            clients = waiting[worker.plan.model].take_all()
            logger.warning("round %d, clients %s: %s", round, clients, reason)
            lost.update(dict.fromkeys(clients, reason))

        while True:
            for worker in self._workers.values():
                if worker.has_room and not worker.is_stopped:
                    fill(worker)
            at_work = [worker for worker in self._workers.values() if worker.clients]
            homeless = [
                worker for worker in self._workers.values() if not worker.has_room and waiting[worker.plan.model]
            ]
            if not (busy := at_work + homeless):
                return
            # Workers may wait for room for as long as others are at work.
            hurried = at_work or homeless
            deadline = min(map(self._deadline, hurried))
            awaited = {worker.awaited_ref: worker for worker in busy}
            ready, _ = ray.wait(list(awaited), timeout=max(deadline - time.monotonic(), 0.0))
            for ref in ready:
                worker = awaited[ref]
                try:
                    result = ray.get(ref)
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    if isinstance(error.cause, NotFiniteError | UnansweredError):  # another attempt would end the same
                        lost[worker.done()] = str(error.cause)
                    else:
                        logger.info("what failed in %s:", worker.plan.name, exc_info=error)
                        replace(worker, str(error.cause))
                except RayError as error:
                    replace(worker, f"{worker.plan.name} died ({first_line(error)})")
                    if not at_work and time.monotonic() >= self._deadline(worker):  # it keeps dying as it starts
                        leave_out(worker)
                else:
                    if worker.has_room:
                        answer = Answer.decode(result)
                        append_to_log(answer.log)
                        yield worker.done(), answer
                    else:
                        worker.arrived(result)
            if not ready:
                for worker in hurried:
                    if time.monotonic() < self._deadline(worker):
                        continue
                    if worker.has_room:
                        times = f" for each of {worker.visits[0]}" if worker.visits[0] > 1 else ""
                        limit = f"failures.visit_timeout_seconds = {self._timeout_seconds:g}{times}"
                        replace(worker, f"took over {limit}")
                    else:
                        leave_out(worker)

    def _waiting(self, downlinks: Mapping[int, bytes], together: int) -> dict[str, _Waiting]:
        """The clients to be visited, by model: each in the queue of the worker that has it by the plan, in groups of
        `together`."""
        by_model: dict[str, list[_Worker]] = {}
        for worker in self._workers.values():
            by_model.setdefault(worker.plan.model, []).append(worker)
        waiting = {model: _Waiting(workers) for model, workers in by_model.items()}
        sizes = self._sizes
        longest_first = sorted(downlinks, key=lambda client: (-sizes[client] if sizes is not None else 0, client))
        left = {*downlinks}
        for worker in self._workers.values():
            own = [client for client in longest_first if client in left and client in worker.plan.clients]
            waiting[worker.plan.model].add(worker, in_groups(own, together))
            left.difference_update(own)
        return waiting

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        """See `Visitor.leave_out`."""
        self.lost = {**self.lost, **reasons}
        check_quorum(round, self._num_asked, self.lost, self._quorum)

    def laps(self) -> list[EnergyWindow]:
        """See `Fleet.laps`. If a node's meter was lost with its worker, another worker meters it from now on."""
        windows: list[EnergyWindow] = []
        for node, worker in list(self._metering.items()):
            try:
                windows += ray.get(worker.actor.lap.remote(), timeout=self._timeout_seconds)
            except RayError:  # its energy is then estimated, and the next visit replaces it
                logger.warning("%s does not answer; energy of node %s is estimated", worker.plan.name, node)
        self._start_meters()
        return windows

    def export_adapters(self, round: int, downlinks: Mapping[int, bytes], folder: Path) -> None:
        """See `Fleet.export_adapters`. A worker that is done is stopped, which makes room for one that waits.

        Raises:
            ClientError: An adapter could not be written.
        """

        def place(client: int) -> tuple[Path]:
            return (folder / client_folder(client),)

        def stop(worker: _Worker) -> None:
            worker.stop()
            for other in self._workers.values():
                if not other.has_room:
                    other.since = time.monotonic()  # from now on there may be room

        for client, answer in self._answers(round, downlinks, "export_adapter", place, idle=stop):
            for name, content in answer.files.items():
                write_file(folder / client_folder(client) / name, content)
        if self.lost:
            client, reason = min(self.lost.items())
            raise ClientError(f"the adapter of client {client} was not written: {reason}")

    def close(self) -> None:
        """Kill the actors."""
        for worker in self._workers.values():
            worker.stop()

    def _replace(self, worker: _Worker) -> None:
        self._metering = {node: other for node, other in self._metering.items() if other is not worker}
        worker.replace()

    def _deadline(self, worker: _Worker) -> float:
        if not worker.has_room:
            return worker.since + self._room_timeout_seconds
        return worker.since + self._timeout_seconds * (worker.visits[0] if worker.visits else 1)

    def _start_meters(self) -> dict[str, ray.ObjectRef[str]]:
        """On each node that is not metered, have a worker start meters; returns references to their names, by node."""
        started = {}
        for worker in self._workers.values():
            node = worker.place.node
            if worker.has_room and node not in self._metering:
                self._metering[node] = worker
                started[node] = worker.actor.start_meter.remote(node, self._uses_gpu)
        return started

    def _await_room(self, worker: _Worker, timeout_seconds: float) -> None:
        """Wait until a worker's process is running.

        Raises:
            PlacementError: The cluster has no room for it.
            ClientError: It died.
        """
        if worker.has_room:
            return
        try:
            worker.arrived(ray.get(worker.arrival_ref, timeout=timeout_seconds))
        except GetTimeoutError:
            plan = worker.plan
            needs = f"{plan.gpus:g} of the GPUs" if plan.gpus else f"{plan.num_cpus:g} of the CPU cores"
            raise PlacementError(
                f"no node had {needs} free for {plan.name} in {timeout_seconds:g} s; wait for their users, add a "
                f"node, or lower resources.max_workers"
            ) from None
        except RayError as error:
            raise ClientError(f"{worker.plan.name} did not start: {first_line(error)}") from error

    def _get(self, ref: ray.ObjectRef[Any], who: str) -> Any:
        try:
            return ray.get(ref, timeout=self._timeout_seconds)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise ClientError(f"{who} did not finish: {first_line(error)}") from error
