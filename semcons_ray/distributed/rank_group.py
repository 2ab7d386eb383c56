"""A worker of several ranks, for a model too large for one device; a fleet uses it like any other worker actor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from semcons_ray.distributed.cluster import NO_CODE, actor_options
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.worker import Arrival, WorkerActor
from semcons_ray.errors import ClientError, first_line
from semcons_ray.federation.fleet import HostSpecProtocol
from semcons_ray.metering.energy import EnergyWindow
from semcons_ray.metering.ledger import Place


def make_room(plan: WorkerPlan) -> PlacementGroup:
    """Book cores or GPUs for all ranks, on the planned node, or together on another node if that one is gone.

    Ray keeps them booked until `remove_placement_group` is called, even when all actors in them are dead.
    """
    bundle = {"GPU": plan.gpus} if plan.gpus else {"CPU": plan.num_cpus}
    bundles = [bundle] * plan.ranks
    room: PlacementGroup = placement_group(bundles, strategy="STRICT_PACK", _soft_target_node_id=plan.node_id)
    return room


@ray.remote
class RankGroup:
    """Has all ranks do the same calls, and returns the first rank's reply.

    It only watches: if a rank dies, the call fails at once, while the other ranks would wait for it in a collective.
    Ranks end with this actor, which owns them, and with their placement group, `room`.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        room: PlacementGroup,
        variables: Mapping[str, str],
        code: Mapping[str, bytes] = NO_CODE,
    ) -> None:
        options = actor_options(node_id=plan.node_id, threads=plan.threads, num_cpus=plan.num_cpus, num_gpus=plan.gpus)
        # Without it, DeepSpeed takes a GPU where there is one, even for ranks on the CPU.
        options["runtime_env"]["env_vars"]["DS_ACCELERATOR"] = "cuda" if plan.gpus else "cpu"
        self._ranks = []
        for rank in range(plan.ranks):
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(room, rank)
            self._ranks.append(WorkerActor.options(**options).remote(variables, code))  # type: ignore[attr-defined]

    def arrive(self, *arguments: Any) -> Arrival:
        """See `WorkerActor.arrive`; once it returns, all ranks are running, on one node."""
        ranks: list[Arrival] = self._wait([actor.arrive.remote(*arguments) for actor in self._ranks])
        return Arrival(Place.of_all([rank.place for rank in ranks]), all(rank.sees_folder for rank in ranks))

    def load(self, spec: HostSpecProtocol, worker: str) -> dict[str, tuple[int, ...]]:
        """Join the ranks in a process group, and load the model; see `WorkerActor.load`."""
        count = len(self._ranks)
        (address,) = self._wait([self._ranks[0].open_rendezvous.remote(count)])
        self._wait([actor.join.remote(rank, count, address) for rank, actor in enumerate(self._ranks)])
        shapes: dict[str, tuple[int, ...]] = self._all("load", spec, worker)
        return shapes

    def first_adapter(self) -> bytes:
        """See `WorkerActor.first_adapter`."""
        adapter: bytes = self._all("first_adapter")
        return adapter

    def visit(self, *arguments: Any) -> bytes:
        """See `WorkerActor.visit`."""
        answer: bytes = self._all("visit", *arguments)
        return answer

    def measure(self, *arguments: Any) -> bytes:
        """See `WorkerActor.measure`."""
        answer: bytes = self._all("measure", *arguments)
        return answer

    def export_adapter(self, *arguments: Any) -> bytes:
        """See `WorkerActor.export_adapter`."""
        answer: bytes = self._all("export_adapter", *arguments)
        return answer

    def start_meter(self, node: str, uses_gpu: bool) -> str:
        """See `WorkerActor.start_meter`."""
        name: str = ray.get(self._ranks[0].start_meter.remote(node, uses_gpu))
        return name

    def lap(self) -> list[EnergyWindow]:
        """See `WorkerActor.lap`."""
        windows: list[EnergyWindow] = ray.get(self._ranks[0].lap.remote())
        return windows

    def _all(self, method: str, *arguments: Any) -> Any:
        return self._wait([getattr(actor, method).remote(*arguments) for actor in self._ranks])[0]

    def _wait(self, refs: list[ray.ObjectRef[Any]]) -> list[Any]:
        """The results of all calls; if one fails, its error is raised at once."""
        waiting = refs
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                ray.get(ready)
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                rank = refs.index(ready[0])
                raise ClientError(f"rank {rank} of {len(self._ranks)} died ({first_line(error)})") from error
        return ray.get(refs)
