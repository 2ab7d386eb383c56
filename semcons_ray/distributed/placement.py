"""Placement: plans where clients run, from model sizes and the cluster's resources, before anything is loaded.

Every client gets an actor of its own where cores (or GPUs) and memory allow. Where they do not, an actor hosts several
clients of one architecture, which take turns in one base model. Every architecture needs an actor; where there are more
architectures than cores, actors share cores. Nothing here calls Ray: a plan is a pure function of its arguments.

Shares of GPUs are assigned to single GPUs as Ray does it (`packed`): 0.6 of a GPU fits twice on two GPUs, and not three
times. Ray assigns them in the order in which actors start, which is the order of planning: engines, the server,
workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from semcons_ray.errors import PlacementError

GIB = 1 << 30

LISTED_CLIENTS = 8
"""Clients of a worker that a plan or a report names."""

STEPS = 10_000
"""Cores and GPUs are booked in steps of 0.0001."""


@dataclass(frozen=True)
class Node:
    """What is free on one machine of the cluster.

    Attributes:
        node_id: The cluster's id of the node; for a bundle of a placement group, its index.
        name: Its host name.
        cpus: Free CPU cores.
        gpus: Free share of each of its GPUs.
        memory_bytes: Free host memory.
        gpu_memory_bytes: Total memory of its smallest GPU; None if it cannot be read.
        gpu_watts: Power limit of a GPU; 0 if it cannot be read.
        cpu_bfloat16: Whether its CPU computes in bfloat16 natively.
        gpu_bfloat16: Whether its GPUs do.
        cuda_fault: Why its torch cannot compute on GPUs, in words for a message; empty if it can.
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
        """Whether `device_bytes` fit into a share of one of its GPUs; True if their memory is not known."""
        return self.gpu_memory_bytes is None or device_bytes <= self.gpu_memory_bytes * share

    def limited(self, memory_bytes: int) -> Node:
        """The same node with at most this much memory."""
        return replace(self, memory_bytes=min(self.memory_bytes, memory_bytes))


def packed(gpus: Sequence[float], shares: Iterable[float]) -> tuple[float, ...] | None:
    """Assign shares to GPUs one after the other; returns what is left of each GPU, or None if a share does not fit.

    A share, at most 1, goes to the GPU with the least left among those with enough.
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
    """A share rounded down to a step that can be booked; rounded up, six sixths would not fit on one GPU."""
    return int(share * STEPS + 1e-6) / STEPS


def choose_device(wanted: str, nodes: Sequence[Node]) -> str:
    """The device on which clients compute, "cpu" or "cuda".

    Args:
        wanted: "cpu", "cuda", or "auto": "cuda" if torch can use GPUs of some node, else "cpu".
        nodes: The nodes.

    Raises:
        PlacementError: "cuda" is wanted, but there is no GPU, or none that torch can use.
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
    """A line for each node whose GPUs torch cannot use; none if `wanted`, see `choose_device`, is "cpu"."""
    faulty = [node for node in nodes if node.gpus and node.cuda_fault and wanted != "cpu"]
    return [f"  GPUs of {node.name} are not used: {node.cuda_fault}" for node in faulty]


@dataclass(frozen=True)
class Demand:
    """The clients of one model, and what a worker that hosts any of them needs.

    Attributes:
        model: Name of the model.
        clients: Ids of its clients.
        host_bytes: Host memory of a worker, all its ranks together.
        device_bytes: GPU memory of each rank.
        ranks: Processes among which the model is divided; 1: it is not.
        elsewhere: Whether answers come from elsewhere, so that its one worker takes no core and no GPU.
        parts: Bytes by what they are for, of the memory with which a worker or a rank computes; may be unknown.
    """

    model: str
    clients: Sequence[int]
    host_bytes: int
    device_bytes: int
    ranks: int = 1
    elsewhere: bool = False
    parts: Mapping[str, int] = field(default_factory=dict)

    def shares(self, limits: Limits) -> list[float]:
        """The share of a GPU that each rank takes. Several ranks take a whole GPU each, as no two can share one."""
        return [limits.gpus_per_worker] if self.ranks == 1 else [1.0] * self.ranks


@dataclass(frozen=True)
class WorkerPlan:
    """The placement of one worker: an actor, or `ranks` actors on one node.

    Attributes:
        name: Its name, as in the ledger.
        node_id: Id of its node.
        node: Host name of its node.
        model: Name of its model.
        clients: Ids of the clients that it hosts.
        threads: CPU threads of each rank.
        gpus: Share of a GPU of each rank; 0 on the CPU.
        memory_bytes: Host memory of all ranks together.
        shared_cpus: Its share of the node's cores, in cores, if workers are more than cores; else None.
        ranks: Processes among which the model is divided; 1: it is not.
        elsewhere: See `Demand`.
    """

    name: str
    node_id: str
    node: str
    model: str
    clients: Sequence[int]
    threads: int
    gpus: float
    memory_bytes: int
    shared_cpus: float | None = None
    ranks: int = 1
    elsewhere: bool = False

    @property
    def num_cpus(self) -> float:
        """Cores to book for each rank: one for each thread, `shared_cpus`, or none beside a GPU or for answers from
        elsewhere."""
        if self.gpus or self.elsewhere:
            return 0
        return self.threads if self.shared_cpus is None else self.shared_cpus


@dataclass(frozen=True)
class ServerPlan:
    """The placement of the server. It books no core, since it works seldom and briefly, while clients generate."""

    node_id: str
    node: str
    gpus: float
    gpu_watts: float


@dataclass(frozen=True)
class Limits:
    """What workers may take, from `resources` in the settings.

    Attributes:
        threads_per_worker: CPU threads of each worker or rank.
        gpus_per_worker: Share of a GPU of each worker.
        max_workers: Most workers; None: no limit.
        one_by_one: Whether all workers are in one process and take turns (fleet local): then each has all cores, and
            all together have one share of one GPU.
    """

    threads_per_worker: int
    gpus_per_worker: float
    max_workers: int | None
    one_by_one: bool = False


@dataclass
class _Room:
    """What is left of a node while workers are placed; `gpu_bytes` is GPU memory taken by workers that take turns."""

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
        """A worker's share of the node's cores, if it has too few for all its workers; else None."""
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
    """Place the server on the first node that has room; returns the plan, and the nodes with what is left.

    Args:
        nodes: What is free on each node, the driver's own node first.
        memory_bytes: Host memory that it takes.
        gpus: Its share of a GPU; 0 on the CPU.

    Raises:
        PlacementError: It does not fit; the message names the setting to change.
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
    """Place workers for all clients: one for each model, and then more for the model with the most clients per worker.

    Workers are added while they fit. Each goes to the node with the fewest workers, so that clients spread over the
    cluster; clients are assigned to the workers of their model in turn. If there are fewer cores than models, further
    workers go where there are the fewest workers per core, and all workers on such a node have equal shares of its
    cores. A model that answers from elsewhere has one worker, which is beside all this and takes memory alone.

    Args:
        demands: One for each model.
        nodes: What engines and the server have left of each node.
        limits: What workers may take.
        device: "cpu" or "cuda".

    Raises:
        PlacementError: Not even one worker for each model fits; the message names the setting to change.
    """
    rooms = [_Room(node, node.cpus, node.gpus, node.memory_bytes) for node in nodes]
    limits = replace(limits, gpus_per_worker=in_steps(limits.gpus_per_worker))
    # What is hardest to place goes first: on GPUs, whole ones before shares.
    hardness = {demand.model: (sum(demand.shares(limits)) if device != "cpu" else 0, demand.host_bytes)
                for demand in demands}  # fmt: skip
    here = [demand for demand in demands if not demand.elsewhere]
    groups = [_Group(demand) for demand in sorted(here, key=lambda demand: hardness[demand.model], reverse=True)]
    beside = [_Group(demand) for demand in demands if demand.elsewhere]
    for group in beside:
        group.rooms.append(_beside_others(rooms, group.demand))
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
        for group in [*groups, *beside]
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
            gpus=group.demand.shares(limits)[0] if device != "cpu" and not group.demand.elsewhere else 0.0,
            memory_bytes=group.demand.host_bytes,
            shared_cpus=None if group.demand.elsewhere else room.shared_cpus(limits, device),
            ranks=group.demand.ranks,
            elsewhere=group.demand.elsewhere,
        )
        for index, (group, room, clients) in enumerate(shares)
    )


def describe_plan(workers: Sequence[WorkerPlan], device: str, sizes: Mapping[str, Demand]) -> str:
    """The plan as text, with one line for each worker; `sizes` are the demands by model."""
    clients = sum(len(worker.clients) for worker in workers)
    nodes = len({worker.node_id for worker in workers})
    lines = [f"{clients} clients on {len(workers)} workers, {nodes} node{'s' if nodes > 1 else ''}, device {device}"]
    sharing = sum(worker.shared_cpus is not None for worker in workers)
    if sharing:
        lines.append(f"  models are more than cores: {sharing} workers share cores, and each is slower for it")
    for worker in workers:
        share = describe_share(worker.gpus, worker.threads)
        if worker.elsewhere:
            share = "no core: answers come from elsewhere"
        if worker.ranks > 1:
            share = f"{worker.ranks} ranks of {share}"
        if worker.shared_cpus is not None:
            share += f" sharing cores ({worker.shared_cpus:.2g})"
        memory = f"{worker.memory_bytes / GIB:.1f} GiB"
        if worker.gpus:
            each = "the" if worker.ranks == 1 else "each"
            memory += f" + {sizes[worker.model].device_bytes / GIB:.1f} GiB of {each} GPU"
        hosted = describe_clients(worker.clients)
        lines.append(f"  {worker.name} on {worker.node}: {share}, {memory}, {worker.model}, clients {hosted}")
    for demand in sizes.values():
        parts = ", ".join(f"{what} {size / GIB:.2f}" for what, size in demand.parts.items())
        if parts:
            lines.append(f"  GiB of {'a rank' if demand.ranks > 1 else 'a worker'} of {demand.model}: {parts}")
    return "\n".join(lines)


def describe_clients(clients: Sequence[int]) -> str:
    """The first clients of a worker and how many it has, as text."""
    more = f", ... ({len(clients)})" if len(clients) > LISTED_CLIENTS else ""
    return ", ".join(map(str, clients[:LISTED_CLIENTS])) + more


def describe_share(gpus: float, threads: int) -> str:
    """A process's GPU share or number of threads, as text."""
    return f"{gpus:g} GPU" if gpus else f"{threads} thread{'s' if threads > 1 else ''}"


def _best(rooms: Sequence[_Room], demand: Demand, limits: Limits, device: str) -> _Room | None:
    fitting = [room for room in rooms if room.fits(demand, limits, device)]
    return min(fitting, key=lambda room: (room.workers, -room.memory), default=None)


def _beside_others(rooms: Sequence[_Room], demand: Demand) -> _Room:
    """The first node with memory for a worker, of which it takes that and nothing else: best the driver's own, since
    answers from elsewhere are kept in the run's folder.

    Raises:
        PlacementError: It does not suffice.
    """
    room = next((room for room in rooms if room.memory >= demand.host_bytes), None)
    if room is None:
        raise PlacementError(_explain_memory(demand, rooms) + "Raise resources.memory_limit_gib, or free memory")
    room.memory -= demand.host_bytes
    return room


def _least_crowded(rooms: Sequence[_Room], demand: Demand, limits: Limits) -> _Room | None:
    """The node with the fewest workers per core. It must have at least as many cores as a worker has threads."""
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
