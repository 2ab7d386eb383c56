"""Where clients run: a plan made from measured model sizes and the cluster's resources, before anything is loaded.

Every client gets an actor of its own where cores (or GPUs) and memory allow. Where they do not, an actor hosts several
clients of one architecture, which take turns in one base model. Every architecture needs an actor; where there are more
of them than cores, actors share cores. Nothing here calls Ray: a plan is a pure function of its arguments.

Shares of GPUs are put on one GPU after another as Ray puts them (`packed`): 0.6 of a GPU fits twice on two GPUs, and
not three times. Ray does so in the order in which actors are started, which is that of planning: engines, the server,
workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from semcons_ray.errors import PlacementError

GIB = 1 << 30

STEPS = 10_000
"""Cores and GPUs are booked in steps of 0.0001."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster: what is free on it.

    Attributes:
        node_id: The cluster's own id for it; of a bundle of a placement group, its index.
        name: Its host name.
        cpus: CPU cores.
        gpus: Free share of each of its GPUs.
        memory_bytes: Host memory.
        gpu_memory_bytes: Memory of its smallest GPU, the whole of it; None where it cannot be read.
        gpu_watts: Power limit of a GPU; 0 where it cannot be read.
        cpu_bfloat16: Its CPU computes in bfloat16 natively.
        gpu_bfloat16: So do its GPUs.
        cuda_fault: Why its torch cannot compute on GPUs, for people; empty: it can.
    """

    node_id: str
    name: str
    cpus: float
    gpus: tuple[float, ...]
    memory_bytes: int
    gpu_memory_bytes: int | None = None
    gpu_watts: float = 0.0
    cpu_bfloat16: bool = False
    gpu_bfloat16: bool = True
    cuda_fault: str = ""

    def gpu_holds(self, device_bytes: int, share: float) -> bool:
        """Whether this much fits into such a share of one of its GPUs, as far as their memory is known."""
        return self.gpu_memory_bytes is None or device_bytes <= self.gpu_memory_bytes * share

    def limited(self, memory_bytes: int) -> Node:
        """The same with no more memory than this."""
        return replace(self, memory_bytes=min(self.memory_bytes, memory_bytes))


def packed(gpus: Sequence[float], shares: Iterable[float]) -> tuple[float, ...] | None:
    """What is left of GPUs when these shares were put on them, one after the other; None if one finds no room.

    A share goes to the GPU that has the least left of those that hold it. Each is at most 1.
    """
    left = list(gpus)
    for share in shares:
        holding = [index for index, free in enumerate(left) if free >= share]
        if not holding:
            return None
        best = min(holding, key=lambda index: left[index])
        left[best] = round(left[best] - share, 4)
    return tuple(left)


def in_steps(share: float) -> float:
    """A share as it can be booked, rounded down: rounded up, six sixths would not fit on one GPU."""
    return int(share * STEPS + 1e-6) / STEPS


def choose_device(wanted: str, nodes: Sequence[Node]) -> str:
    """What clients compute on, "cpu" or "cuda", where `wanted` may be "auto", too: GPUs where torch can use some.

    Raises:
        PlacementError: GPUs are wanted, and there is none, or torch can use none.
    """
    with_gpus = [node for node in nodes if node.gpus]
    usable = [node for node in with_gpus if not node.cuda_fault]
    if wanted == "auto":
        return "cuda" if usable else "cpu"
    if wanted == "cuda" and not with_gpus:
        raise PlacementError(
            "resources.device is cuda, but no node has a GPU, or CUDA_VISIBLE_DEVICES hides it; set it to auto or cpu"
        )
    if wanted == "cuda" and not usable:
        raise PlacementError(
            f"resources.device is cuda, but on {with_gpus[0].name} {with_gpus[0].cuda_fault}; install a torch built "
            f"for the CUDA of its driver there, or set resources.device to auto or cpu"
        )
    return wanted


def unused_gpus(wanted: str, nodes: Sequence[Node]) -> list[str]:
    """A line for each node whose GPUs torch cannot use, unless nobody wants them."""
    faulty = [node for node in nodes if node.gpus and node.cuda_fault and wanted != "cpu"]
    return [f"  GPUs of {node.name} are not used: {node.cuda_fault}" for node in faulty]


@dataclass(frozen=True)
class Demand:
    """The clients of one model, and what a worker that hosts any of them needs.

    `host_bytes` are of all ranks together, `device_bytes` of the GPU of each.
    """

    model: str
    clients: tuple[int, ...]
    host_bytes: int
    device_bytes: int
    ranks: int = 1

    def shares(self, limits: Limits) -> list[float]:
        """Of GPUs, one a rank: several ranks have a whole one each, as no two can be on one."""
        return [limits.gpus_per_worker] if self.ranks == 1 else [1.0] * self.ranks


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
class ServerPlan:
    """The server: it books no core, since it works seldom and shortly, while clients generate."""

    node_id: str
    node: str
    gpus: float
    gpu_watts: float


@dataclass(frozen=True)
class Limits:
    """What a worker takes, from `resources` in the config.

    Where workers work `one_by_one`, in one process, each has all cores to itself, and all have one share of one GPU.
    """

    threads_per_worker: int
    gpus_per_worker: float
    max_workers: int | None
    one_by_one: bool = False


@dataclass
class _Room:
    """What is left of a node; `gpu_bytes` were taken by workers that share one share of a GPU."""

    node: Node
    cpus: float
    gpus: tuple[float, ...]
    memory: int
    workers: int = 0
    gpu_bytes: int = 0

    def fits(self, demand: Demand, limits: Limits, device: str) -> bool:
        if self.memory < demand.host_bytes:
            return False
        if device == "cpu":
            return (self.node.cpus if limits.one_by_one else self.cpus) >= limits.threads_per_worker * demand.ranks
        return self.gpus_after(demand, limits) is not None and self.gpu_holds(demand, limits)

    def gpus_after(self, demand: Demand, limits: Limits) -> tuple[float, ...] | None:
        shares = demand.shares(limits)
        return packed(self.gpus, [] if limits.one_by_one and self.workers else shares)

    def gpu_holds(self, demand: Demand, limits: Limits) -> bool:
        return self.node.gpu_holds(self.gpu_bytes + demand.device_bytes, demand.shares(limits)[0])

    def take(self, demand: Demand, limits: Limits, device: str) -> None:
        self.memory -= demand.host_bytes
        if device == "cpu":
            self.cpus -= limits.threads_per_worker * demand.ranks
        else:
            self.gpus = self.gpus_after(demand, limits) or ()
            self.gpu_bytes += demand.device_bytes if limits.one_by_one else 0
        self.workers += demand.ranks

    def shared_cpus(self, limits: Limits, device: str) -> float | None:
        """A worker's share of the cores, if there are too few for all workers here."""
        if device != "cpu" or limits.one_by_one or self.cpus >= 0:
            return None
        return in_steps(self.node.cpus / self.workers)


@dataclass
class _Group:
    demand: Demand
    rooms: list[_Room] = field(default_factory=list)

    @property
    def load(self) -> float:
        return len(self.demand.clients) / len(self.rooms) if self.rooms else float("inf")


def plan_server(nodes: Sequence[Node], *, memory_bytes: int, gpus: float) -> tuple[ServerPlan, tuple[Node, ...]]:
    """The server on the first node that has room, and what it leaves of the nodes.

    Args:
        nodes: What is free, the driver's own first.
        memory_bytes: Host memory that it takes.
        gpus: Its share of a GPU; 0 on the CPU.

    Raises:
        PlacementError: It does not fit; names the setting to change.
    """
    shares = [in_steps(gpus)] if gpus else []
    for index, node in enumerate(nodes):
        left = packed(node.gpus, shares)
        if left is not None and node.memory_bytes >= memory_bytes:
            plan = ServerPlan(node.node_id, node.name, sum(shares), node.gpu_watts)
            taken = replace(node, gpus=left, memory_bytes=node.memory_bytes - memory_bytes)
            return plan, (*nodes[:index], taken, *nodes[index + 1 :])
    if all(packed(node.gpus, shares) is None for node in nodes):
        raise PlacementError(
            f"no node has resources.server_gpus = {gpus:g} of a GPU free for the server; lower it or "
            f"resources.engine_gpus, or set it to 0: the server then works on the CPU"
        )
    raise PlacementError(
        f"the server needs {memory_bytes / GIB:.1f} GiB of memory, and no node has as much free"
        f"{' with a GPU' if gpus else ''}; raise resources.memory_limit_gib, or use a machine with more"
    )


def plan_workers(
    demands: Sequence[Demand], nodes: Sequence[Node], limits: Limits, *, device: str
) -> tuple[WorkerPlan, ...]:
    """Workers for all clients: one a model first, then one more where the clients per worker are most, while it fits.

    Workers go to the node with the fewest of them, so that clients spread over the cluster; clients are dealt out to
    the workers of their model in turn. Where cores are too few for one worker a model, those that are left over go
    where workers a core are fewest, and all on such a node have equal shares of its cores.

    Args:
        demands: One a model.
        nodes: What engines and the server leave of them.
        limits: See there.
        device: "cpu" or "cuda".

    Raises:
        PlacementError: Not even one worker for each model fits; names the setting to change.
    """
    rooms = [_Room(node, node.cpus, node.gpus, node.memory_bytes) for node in nodes]
    limits = replace(limits, gpus_per_worker=in_steps(limits.gpus_per_worker))
    # What is hardest to place goes first: on GPUs, whole ones before shares.
    hardness = {demand.model: (sum(demand.shares(limits)) if device != "cpu" else 0, demand.host_bytes)
                for demand in demands}  # fmt: skip
    groups = [_Group(demand) for demand in sorted(demands, key=lambda demand: hardness[demand.model], reverse=True)]
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
            gpus=group.demand.shares(limits)[0] if device != "cpu" else 0.0,
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
        return _explain_memory(demand, rooms) + (
            "Use a smaller model.name, training.batch_size, generation.batch_size or model.max_length, fewer models in "
            "clients.mix, or raise resources.memory_limit_gib"
        )
    rooms = [room for room in rooms if room.gpus_after(demand, limits) is not None]
    if not rooms and demand.ranks > 1:
        return (
            f"no node has {demand.ranks} GPUs free for the ranks of {demand.model}; lower its number in "
            f"sharding.models, or set resources.device to cpu"
        )
    if not rooms:
        return (
            f"no node has {limits.gpus_per_worker:g} of a GPU free for a worker of {demand.model}; lower "
            f"resources.gpus_per_worker, resources.server_gpus or resources.engine_gpus, or set resources.device to cpu"
        )
    taken = sum(room.gpu_bytes for room in rooms)
    rooms = [room for room in rooms if room.gpu_holds(demand, limits)]
    if not rooms:
        share = demand.shares(limits)[0]
        which = f"resources.gpus_per_worker = {share:g} of any GPU; raise it, or" if share < 1 else "any GPU;"
        beside = " beside the other models of clients.mix" if limits.one_by_one and taken else ""
        return (
            f"{demand.device_bytes / GIB:.1f} GiB for {'a rank' if demand.ranks > 1 else 'a worker'} of {demand.model} "
            f"do not fit{beside} in {which} use a smaller training.batch_size or model.max_length, or divide the model "
            f"among {'more' if demand.ranks > 1 else 'several'} GPUs with sharding.models"
        )
    return _explain_memory(demand, rooms) + (
        "Use fewer models in clients.mix, leave sharding.cpu_offload off, or raise resources.memory_limit_gib"
    )


def _explain_memory(demand: Demand, rooms: Sequence[_Room]) -> str:
    most = max(room.memory for room in rooms)
    return (
        f"a worker of {demand.model} needs {demand.host_bytes / GIB:.1f} GiB of host memory, and the most a node has "
        f"left is {max(most, 0) / GIB:.1f} GiB. "
    )
