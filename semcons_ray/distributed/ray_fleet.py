"""`RayFleet`: clients visited as Ray actors, all workers at once, each with its clients in turn.

A worker that dies, or whose visit takes too long, is replaced; the visit it was at is tried again up to a limit, and
then its client is left out of the round. Visits are exactly once (see federation/store.py), so a repeated one costs
time and changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from semcons_ray.distributed.cluster import actor_options
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.rank_group import RankGroup, make_room
from semcons_ray.distributed.worker import WorkerActor
from semcons_ray.errors import ClientError, UserError, first_line
from semcons_ray.federation.fleet import HostSpecProtocol, Reply, check_quorum, client_folder
from semcons_ray.metering.energy import NodeEnergy

logger = logging.getLogger(__name__)

_REPLY = msgspec.msgpack.Decoder(Reply)


class _Worker:
    """One actor, what made it, and the visits it has in hand (the first is the one it is at)."""

    def __init__(self, plan: WorkerPlan, spec: HostSpecProtocol) -> None:
        self.plan = plan
        self.spec = spec
        self.in_hand: dict[ray.ObjectRef[Any], int] = {}
        self.head_since = 0.0
        self.room: PlacementGroup | None = None
        self.start()

    def start(self) -> None:
        """Make the actor and let it load."""
        plan = self.plan
        options = actor_options(node_id=plan.node_id, threads=plan.threads, num_cpus=plan.num_cpus, num_gpus=plan.gpus)
        if plan.ranks == 1:
            self.actor = WorkerActor.options(**options).remote()  # type: ignore[attr-defined]
        else:  # it watches; its ranks take the cores and GPUs
            self.room = make_room(plan)
            self.actor = RankGroup.options(**{**options, "num_cpus": 0, "num_gpus": 0}).remote(plan, self.room)  # type: ignore[attr-defined]
        self.load_ref = self.actor.load.remote(self.spec)

    def replace(self) -> None:
        """Kill the actor, if it lives, and start another."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Kill the actor, with its ranks if it has any."""
        ray.kill(self.actor, no_restart=True)
        if self.room is not None:
            remove_placement_group(self.room)


class RayFleet:
    """Clients on Ray actors; see `Fleet` for its methods.

    Args:
        plans: Workers, as placed.
        specs: How each worker builds its host, in the same order.
        timeout_seconds: A visit that takes longer is given up.
        max_restarts: How often a visit is tried again.
        quorum: Share of the clients visited that must answer.
        uses_gpu: Whether GPUs are metered.

    Raises:
        UserError: A worker could not load its model; what to change is in the message.
        ClientError: A worker died while it was loading.
    """

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        specs: Sequence[HostSpecProtocol],
        *,
        timeout_seconds: float,
        max_restarts: int,
        quorum: float,
        uses_gpu: bool,
    ) -> None:
        self._workers = {plan.name: _Worker(plan, spec) for plan, spec in zip(plans, specs, strict=True)}
        self._worker_of = {client: worker for worker in self._workers.values() for client in worker.plan.clients}
        self._timeout_seconds = timeout_seconds
        self._max_restarts = max_restarts
        self._quorum = quorum
        self.workers = {plan.name: plan.node for plan in plans}
        one_a_node = {worker.plan.node: worker for worker in reversed(self._workers.values())}
        self._metering = list(one_a_node.values())
        for worker in self._workers.values():
            self._get(worker.load_ref, f"{worker.plan.name} while it was loading")
        meters = [worker.actor.start_meter.remote(uses_gpu) for worker in self._metering]
        self.meters = {worker.plan.node: ray.get(ref) for worker, ref in zip(self._metering, meters, strict=True)}

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """See `Fleet.visit`."""
        return self._ask(
            round, downlinks, lambda actor, client, downlink: actor.visit.remote(client, round, downlink, evaluate)
        )

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        """See `Fleet.measure`."""
        return self._ask(
            round, downlinks, lambda actor, client, downlink: actor.measure.remote(client, round, downlink)
        )

    def _ask(self, round: int, downlinks: Mapping[int, bytes], call: Callable[[Any, int, Any], Any]) -> Iterator[Reply]:
        """Replies to `call`. An actor works its calls off in order, so only the first of each needs to be watched."""
        shared = {downlink: ray.put(downlink) for downlink in set(downlinks.values())}
        attempts: Counter[int] = Counter()
        lost: dict[int, str] = {}

        def send(worker: _Worker, clients: Sequence[int]) -> None:
            worker.head_since = time.monotonic()
            worker.in_hand = {call(worker.actor, client, shared[downlinks[client]]): client for client in clients}

        def replace(worker: _Worker, reason: str) -> None:
            first, *others = worker.in_hand.values()
            attempts[first] += 1
            logger.warning("round %d, client %d, attempt %d: %s", round, first, attempts[first], reason)
            if attempts[first] > self._max_restarts:
                lost[first] = reason
            worker.replace()
            send(worker, others if first in lost else [first, *others])

        for worker in self._workers.values():
            send(worker, [client for client in worker.plan.clients if client in downlinks])
        while heads := {next(iter(worker.in_hand)): worker for worker in self._workers.values() if worker.in_hand}:
            deadline = min(worker.head_since for worker in heads.values()) + self._timeout_seconds
            ready, _ = ray.wait(list(heads), timeout=max(deadline - time.monotonic(), 0.0))
            for ref in ready:
                worker = heads[ref]
                try:
                    reply = _REPLY.decode(ray.get(ref))
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    replace(worker, str(error.cause))
                except RayError as error:
                    replace(worker, f"{worker.plan.name} died ({first_line(error)})")
                else:
                    del worker.in_hand[ref]
                    worker.head_since = time.monotonic()
                    yield reply
            if not ready:
                for worker in heads.values():
                    if time.monotonic() - worker.head_since >= self._timeout_seconds:
                        replace(worker, f"took over failures.visit_timeout_seconds = {self._timeout_seconds:g}")
        check_quorum(round, len(downlinks), lost, self._quorum)

    def laps(self) -> list[NodeEnergy]:
        """See `Fleet.laps`."""
        energies = []
        for worker in self._metering:
            try:
                energies.append(ray.get(worker.actor.lap.remote(), timeout=self._timeout_seconds))
            except RayError:  # its energy is then estimated, and the next visit replaces it
                logger.warning("%s does not answer; energy of node %s is estimated", worker.plan.name, worker.plan.node)
        return [energy for energy in energies if energy is not None]

    def export_adapters(self, round: int, downlinks: Mapping[int, bytes], folder: Path) -> None:
        """See `Fleet.export_adapters`."""
        for client_id, downlink in downlinks.items():
            worker = self._worker_of[client_id]
            arguments = (client_id, round, downlink, folder / client_folder(client_id))
            try:
                self._get(worker.actor.export_adapter.remote(*arguments), worker.plan.name)
            except ClientError:
                worker.replace()
                self._get(worker.actor.export_adapter.remote(*arguments), worker.plan.name)

    def close(self) -> None:
        """Kill the actors."""
        for worker in self._workers.values():
            worker.stop()

    def _get(self, ref: ray.ObjectRef[Any], who: str) -> Any:
        try:
            return ray.get(ref, timeout=self._timeout_seconds)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise ClientError(f"{who} did not finish: {first_line(error)}") from error
