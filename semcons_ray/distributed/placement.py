"""Where clients run: a plan made from measured model sizes and the cluster's resources, before anything is loaded.

Every client gets an actor of its own where cores (or GPUs) and memory allow. Where they do not, an actor hosts several
clients of one architecture, which take turns in one base model. Every architecture needs an actor; where there are more
of them than cores, actors share cores. Nothing here names Ray: a plan is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from semcons_ray.errors import PlacementError

GIB = 1 << 30

SHARES_A_CORE = 10_000
"""Cores are booked in steps of 0.0001."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster: what is free on it.

    Attributes:
        node_id: The cluster's own id for it; of a bundle of a placement group, its index.
        name: Its host name.
        cpus: CPU cores.
        gpus: GPUs.
        memory_bytes: Host memory.
        gpu_memory_bytes: Memory of its smallest GPU; None where it cannot be read.
        gpu_watts: Power limit of a GPU; 0 where it cannot be read.
        cpu_bfloat16: Its CPU computes in bfloat16 natively.
        gpu_bfloat16: So do its GPUs.
    """

    node_id: str
    name: str
    cpus: float
    gpus: float
    memory_bytes: int
    gpu_memory_bytes: int | None = None
    gpu_watts: float = 0.0
    cpu_bfloat16: bool = False
    gpu_bfloat16: bool = True

    def gpu_holds(self, device_bytes: int, share: float) -> bool:
        """Whether this much fits into such a share of one of its GPUs, as far as their memory is known."""
        return self.gpu_memory_bytes is None or device_bytes <= self.gpu_memory_bytes * min(share, 1.0)

    def limited(self, memory_bytes: int) -> Node:
        """The same with no more memory than this."""
        return replace(self, memory_bytes=min(self.memory_bytes, memory_bytes))


@dataclass(frozen=True)
class Demand:
    """The clients of one model, and what a worker that hosts any of them needs."""

    model: str
    clients: tuple[int, ...]
    host_bytes: int
    device_bytes: int
    ranks: int = 1

    def gpus(self, limits: Limits) -> float:
        """Of each rank; several have a whole one each, as no two can be on one."""
        return limits.gpus_per_worker if self.ranks == 1 else 1.0


@dataclass(frozen=True)
class WorkerPlan:
    """One actor, or `ranks` of them on one node: threads, GPUs and cores are of each, memory is of all.

    `shared_cpus` is its share of its node's cores, if it shares them with other actors; else None.
    """

    name: str
    node_id: str
    node: str
    model: str
    clients: tuple[int, ...]
    threads: int
    gpus: float
    memory_bytes: int
    shared_cpus: float | None = None
    ranks: int = 1

    @property
    def num_cpus(self) -> float:
        """Cores to book for each rank: one a thread, a share of them, or none beside a GPU."""
        if self.gpus:
            return 0
        return self.threads if self.shared_cpus is None else self.shared_cpus


@dataclass(frozen=True)
class Limits:
    """What a worker takes, and what is kept back, from `resources` in the config.

    Where workers work `one_by_one`, in one process, each has all cores to itself.
    """

    threads_per_worker: int
    gpus_per_worker: float
    max_workers: int | None
    server_bytes: int
    server_gpus: float
    one_by_one: bool = False


@dataclass
class _Room:
    node: Node
    cpus: float
    gpus: float
    memory: int
    workers: int = 0

    def fits(self, demand: Demand, limits: Limits, device: str) -> bool:
        if self.memory < demand.host_bytes:
            return False
        if device == "cpu":
            return (self.node.cpus if limits.one_by_one else self.cpus) >= limits.threads_per_worker * demand.ranks
        share = demand.gpus(limits)
        return self.gpus >= share * demand.ranks - 1e-9 and self.node.gpu_holds(demand.device_bytes, share)

    def take(self, demand: Demand, limits: Limits, device: str) -> None:
        self.memory -= demand.host_bytes
        self.workers += demand.ranks
        if device == "cpu":
            self.cpus -= limits.threads_per_worker * demand.ranks
        else:
            self.gpus -= demand.gpus(limits) * demand.ranks

    def shared_cpus(self, limits: Limits, device: str) -> float | None:
        """A worker's share of the cores, if there are too few for all workers here."""
        if device != "cpu" or limits.one_by_one or self.cpus >= 0:
            return None
        return self.node.cpus * SHARES_A_CORE // self.workers / SHARES_A_CORE


@dataclass
class _Group:
    demand: Demand
    rooms: list[_Room] = field(default_factory=list)

    @property
    def load(self) -> float:
        return len(self.demand.clients) / len(self.rooms) if self.rooms else float("inf")


def plan_workers(
    demands: Sequence[Demand], nodes: Sequence[Node], limits: Limits, *, device: str
) -> tuple[WorkerPlan, ...]:
    """Workers for all clients: one a model first, then one more where the clients per worker are most, while it fits.

    Workers go to the node with the fewest of them, so that clients spread over the cluster; clients are dealt out to
    the workers of their model in turn. Where cores are too few for one worker a model, those that are left over go
    where workers a core are fewest, and all on such a node have equal shares of its cores.

    Raises:
        PlacementError: Not even one worker for each model fits; names the setting to change.
    """
    rooms = [_Room(node, node.cpus, node.gpus, node.memory_bytes) for node in nodes]
    rooms[0].memory -= limits.server_bytes
    if device != "cpu":
        rooms[0].gpus -= limits.server_gpus
    groups = [_Group(demand) for demand in sorted(demands, key=lambda demand: -demand.host_bytes)]
    if limits.max_workers is not None and limits.max_workers < len(groups):
        raise PlacementError(
            f"{len(groups)} architectures need a worker each, but resources.max_workers is {limits.max_workers}"
        )
    for group in groups:
        room = _best(rooms, group.demand, limits, device)
        if room is None and device == "cpu":
            room = _least_crowded(rooms, group.demand, limits)
        if room is None:
            raise PlacementError(_explain(group.demand, rooms, limits, device))
        room.take(group.demand, limits, device)
        group.rooms.append(room)
    growing = list(groups)
    while growing and (limits.max_workers is None or sum(len(group.rooms) for group in groups) < limits.max_workers):
        group = max(growing, key=lambda group: group.load)
        room = _best(rooms, group.demand, limits, device) if group.load > 1 else None
        if room is None:
            growing.remove(group)
            continue
        room.take(group.demand, limits, device)
        group.rooms.append(room)
    shares = [
        (group, room, group.demand.clients[start :: len(group.rooms)])
        for group in groups
        for start, room in enumerate(group.rooms)
    ]
    shares.sort(key=lambda share: share[2][0])
    return tuple(
        WorkerPlan(
            name=f"worker-{index}",
            node_id=room.node.node_id,
            node=room.node.name,
            model=group.demand.model,
            clients=clients,
            threads=limits.threads_per_worker,
            gpus=group.demand.gpus(limits) if device != "cpu" else 0.0,
            memory_bytes=group.demand.host_bytes,
            shared_cpus=room.shared_cpus(limits, device),
            ranks=group.demand.ranks,
        )
        for index, (group, room, clients) in enumerate(shares)
    )


def describe_plan(workers: Sequence[WorkerPlan], device: str, sizes: Mapping[str, Demand]) -> str:
    """The plan as one line a worker, for people."""
    clients = sum(len(worker.clients) for worker in workers)
    nodes = len({worker.node_id for worker in workers})
    lines = [f"{clients} clients on {len(workers)} workers, {nodes} node{'s' if nodes > 1 else ''}, device {device}"]
    sharing = sum(worker.shared_cpus is not None for worker in workers)
    if sharing:
        lines.append(f"  models are more than cores: {sharing} workers share cores, and each is slower for it")
    for worker in workers:
        share = describe_share(worker.gpus, worker.threads)
        if worker.ranks > 1:
            share = f"{worker.ranks} ranks of {share}"
        if worker.shared_cpus is not None:
            share += f" sharing cores ({worker.shared_cpus:.2g})"
        memory = f"{worker.memory_bytes / GIB:.1f} GiB"
        if worker.gpus:
            each = "the" if worker.ranks == 1 else "each"
            memory += f" + {sizes[worker.model].device_bytes / GIB:.1f} GiB of {each} GPU"
        hosted = ", ".join(str(client) for client in worker.clients[:8])
        more = f", ... ({len(worker.clients)})" if len(worker.clients) > 8 else ""
        lines.append(f"  {worker.name} on {worker.node}: {share}, {memory}, {worker.model}, clients {hosted}{more}")
    return "\n".join(lines)


def describe_share(gpus: float, threads: int) -> str:
    """What a process computes on, for people."""
    return f"{gpus:g} GPU" if gpus else f"{threads} thread{'s' if threads > 1 else ''}"


def _best(rooms: Sequence[_Room], demand: Demand, limits: Limits, device: str) -> _Room | None:
    fitting = [room for room in rooms if room.fits(demand, limits, device)]
    return min(fitting, key=lambda room: (room.workers, -room.memory), default=None)


def _least_crowded(rooms: Sequence[_Room], demand: Demand, limits: Limits) -> _Room | None:
    """Where one more worker shares the cores: threads beyond a node's cores help nobody, so it must have enough."""
    fitting = [
        room for room in rooms if room.memory >= demand.host_bytes and room.node.cpus >= limits.threads_per_worker
    ]
    return min(fitting, key=lambda room: (room.workers / room.node.cpus, -room.memory), default=None)


def _explain(demand: Demand, rooms: Sequence[_Room], limits: Limits, device: str) -> str:
    if device == "cpu":
        rooms = [room for room in rooms if room.node.cpus >= limits.threads_per_worker]
        if not rooms:
            return (
                f"no node has {limits.threads_per_worker} CPU cores for a worker of {demand.model}; lower "
                f"resources.threads_per_worker, or use a machine with more"
            )
    most = max(room.memory for room in rooms)
    if most < demand.host_bytes:
        return (
            f"a worker of {demand.model} needs {demand.host_bytes / GIB:.1f} GiB of memory, and the most a node has "
            f"left is {max(most, 0) / GIB:.1f} GiB. Use a smaller model.name, training.batch_size, "
            f"generation.batch_size or model.max_length, fewer models in clients.mix, or raise "
            f"resources.memory_limit_gib"
        )
    if demand.ranks > 1 and max(room.gpus for room in rooms) < demand.ranks:
        return (
            f"no node has {demand.ranks} GPUs free for the ranks of {demand.model}; lower its number in "
            f"sharding.models, or set resources.device to cpu"
        )
    if max(room.gpus for room in rooms) < limits.gpus_per_worker:
        return (
            f"no node has {limits.gpus_per_worker:g} of a GPU free for a worker of {demand.model}; lower "
            f"resources.gpus_per_worker or resources.server_gpus, or set resources.device to cpu"
        )
    return (
        f"{demand.device_bytes / GIB:.1f} GiB for a worker of {demand.model} do not fit in "
        f"resources.gpus_per_worker = {limits.gpus_per_worker:g} of any GPU; raise it, or use a smaller "
        f"training.batch_size or model.max_length"
    )
