"""Generation engines as Ray actors: their placement, and how workers call them.

There are one or more actors for each base model. Calls of several workers run in one at once, so that their prompts
are batched together. An answer does not depend, but for rounding, on which of them is asked: a request has the adapter
and every prompt's random stream with it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from semcons_ray.distributed.cluster import actor_options, begin, passed_on
from semcons_ray.distributed.placement import GIB, Demand, Node, describe_share, in_steps, packed
from semcons_ray.errors import EngineError, PlacementError, first_line
from semcons_ray.metering.gpus import this_place
from semcons_ray.modeling.engine import EngineReply, EngineRequest
from semcons_ray.modeling.vllm_engine import EngineSpec, VllmEngine
from semcons_ray.tracking.run_log import join_run_log

SLOW_SECONDS = 1.0
"""So long an engine is waited for to say how many requests it has. One that has answered others says it at once."""


@dataclass(frozen=True)
class EnginePlan:
    """The placement of one engine.

    Attributes:
        name: Its name, as in the ledger.
        node_id: Id of its node.
        node: Host name of its node.
        model: Name of its base model.
        threads: CPU threads.
        cpus: Cores booked for it; with 0 it works on the cores of workers that wait for it.
        gpus: Share of a GPU booked for it; 0 on the CPU.
        memory_bytes: Host memory.
        device_bytes: GPU memory.
    """

    name: str
    node_id: str
    node: str
    model: str
    threads: int
    cpus: int
    gpus: float
    memory_bytes: int
    device_bytes: int


def plan_engines(
    demands: Sequence[Demand], nodes: Sequence[Node], *, threads: int, cpus: int, gpus: float, kept_bytes: int
) -> tuple[tuple[EnginePlan, ...], tuple[Node, ...]]:
    """Place an engine for each demand; returns the plans, and the nodes with what is left for workers.

    An engine goes to the node with the most memory left; on GPUs, to a node where it leaves the most GPUs whole.

    Args:
        demands: What each engine needs; the largest is placed first.
        nodes: What is free on each node.
        threads: CPU threads of each engine.
        cpus: Cores booked for each engine, at most `threads`.
        gpus: Each engine's share of a GPU; 0 on the CPU.
        kept_bytes: Memory of the first node that is kept for the server.

    Raises:
        PlacementError: An engine does not fit; the message names the setting to change.
    """
    left = list(nodes)
    plans: list[EnginePlan] = []
    shares = [in_steps(gpus)] if gpus else []
    for demand in sorted(demands, key=lambda demand: -demand.host_bytes):
        free = [node.memory_bytes - (kept_bytes if index == 0 else 0) for index, node in enumerate(left)]
        tried = {index: _taken(node, demand, free[index], cpus, shares) for index, node in enumerate(left)}
        taken = {index: node for index, node in tried.items() if node is not None}
        if not taken:
            raise PlacementError(_explain(demand, max(free), cpus, gpus))
        best = max(taken, key=lambda index: (taken[index].gpus.count(1.0) - left[index].gpus.count(1.0), free[index]))
        node, left[best] = left[best], taken[best]
        name = f"engine-{len(plans)}"
        plans.append(
            EnginePlan(
                name,
                node.node_id,
                node.name,
                demand.model,
                threads,
                cpus,
                sum(shares),
                demand.host_bytes,
                demand.device_bytes,
            )
        )
    return tuple(plans), tuple(left)


def _taken(node: Node, demand: Demand, free: int, cpus: int, shares: Sequence[float]) -> Node | None:
    """The node with what an engine would leave of it, where `free` is the memory it may take; None if it does not
    fit."""
    gpus = packed(node.gpus, shares)
    held = all(node.gpu_holds(demand.device_bytes, share) for share in shares)
    if gpus is None or not held or free < demand.host_bytes or node.cpus < cpus:
        return None
    return replace(node, memory_bytes=node.memory_bytes - demand.host_bytes, cpus=node.cpus - cpus, gpus=gpus)


def _explain(demand: Demand, most: int, cpus: int, gpus: float) -> str:
    what = f"{cpus} CPU cores (resources.engine_threads)" if cpus else "no core of its own"
    if gpus:
        what = f"{demand.device_bytes / GIB:.1f} GiB in resources.engine_gpus = {gpus:g} of a GPU"
    return (
        f"the vllm engine of {demand.model} does not fit: it needs {demand.host_bytes / GIB:.1f} GiB of memory, and "
        f"the most a node has left is {max(most, 0) / GIB:.1f} GiB; it needs {what}. Lower "
        f"resources.engine_cache_gib, or set generation.engine to transformers"
    )


def describe_engines(engines: Sequence[EnginePlan]) -> str:
    """The plan with one line for each engine, each after a line break."""
    lines = []
    for engine in engines:
        share = describe_share(engine.gpus, engine.threads)
        if not engine.gpus and not engine.cpus:
            share += " on cores of workers that wait"
        memory = f"{engine.memory_bytes / GIB:.1f} GiB"
        if engine.gpus:
            memory += f" + {engine.device_bytes / GIB:.1f} GiB of the GPU"
        lines.append(f"\n  {engine.name} on {engine.node}: {share}, {memory}, {engine.model}, vllm")
    return "".join(lines)


@ray.remote
class EngineActor:
    """A process that holds an engine. If it dies, Ray starts another and repeats the calls that were not answered."""

    def __init__(self, spec: EngineSpec, variables: Mapping[str, str]) -> None:
        begin(variables)
        self._spec = spec
        self._engine: VllmEngine | None = None
        self._failure: Exception | None = None
        self._loading = threading.Lock()
        self._counting = threading.Lock()
        self._num_open = 0

    def load(self) -> None:
        """Load the model. The constructor does not, since its errors do not reach the caller."""
        join_run_log(self._spec.name)
        self._loaded()

    def generate(self, request: EngineRequest) -> EngineReply:
        """See `Engine.generate`."""
        with self._counting:
            self._num_open += 1
        try:
            return self._answer(request)
        finally:
            with self._counting:
                self._num_open -= 1

    def num_open(self) -> int:
        """How many requests are not answered yet."""
        return self._num_open

    def host_bytes(self) -> int:
        """See `VllmEngine.host_bytes`."""
        return self._loaded().host_bytes()

    def _answer(self, request: EngineRequest) -> EngineReply:
        engine = self._loaded()
        try:
            return engine.generate(request)
        except EngineError:
            if engine.is_broken:
                os._exit(1)
            raise

    def _loaded(self) -> VllmEngine:
        with self._loading:
            if self._failure:
                raise self._failure
            if self._engine is None:
                try:
                    self._engine = self._spec.build(this_place(uses_gpu=self._spec.gpus > 0).gpus)
                except Exception as error:
                    self._failure = error
                    raise
            return self._engine


@dataclass(frozen=True)
class RayEngine:
    """An engine in an actor. Copies of this object, in any process, use the same actor."""

    name: str
    actor: Any

    @classmethod
    def start(cls, spec: EngineSpec, plan: EnginePlan, *, callers: int, max_restarts: int) -> RayEngine:
        """Start the actor and have it load; see `wait`.

        Args:
            spec: What the engine is built from.
            plan: Where it goes.
            callers: Most requests at a time.
            max_restarts: How often a request is repeated if the engine dies while answering it.
        """
        options = actor_options(node_id=plan.node_id, threads=plan.threads, num_cpus=plan.cpus, num_gpus=plan.gpus)
        actor = EngineActor.options(  # type: ignore[attr-defined]
            **options, max_concurrency=2 * callers + 1, max_restarts=-1, max_task_retries=max_restarts
        ).remote(spec, passed_on())
        actor.load.remote()
        return cls(spec.name, actor)

    def wait(self) -> None:
        """Wait until it is loaded.

        Raises:
            UserError: It cannot load; the message says what to change.
            EngineError: It died while it was loading.
        """
        self._get(self.actor.load.remote())

    def generate(self, request: EngineRequest) -> EngineReply:
        """See `Engine.generate`."""
        reply: EngineReply = self._get(self.actor.generate.remote(request))
        return reply

    def host_bytes(self) -> int:
        """See `VllmEngine.host_bytes`."""
        return int(self._get(self.actor.host_bytes.remote()))

    def close(self) -> None:
        """Kill the actor."""
        ray.kill(self.actor, no_restart=True)

    def _get(self, ref: ray.ObjectRef[Any]) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise EngineError(f"{self.name} died: {first_line(error)}") from error


@dataclass(frozen=True)
class Replicas:
    """Several engines of one base model, of which the one with the fewest open requests is asked.

    Attributes:
        engines: The engines.
    """

    engines: tuple[RayEngine, ...]

    def generate(self, request: EngineRequest) -> EngineReply:
        """See `Engine.generate`."""
        return self._least_loaded().generate(request)

    def _least_loaded(self) -> RayEngine:
        """One that is starting again does not say how many it has, and is passed over while another does.

        If several have the fewest, workers that ask at the same moment do not all take the same.
        """
        counts = [engine.actor.num_open.remote() for engine in self.engines]
        told, _ = ray.wait(counts, num_returns=len(counts), timeout=SLOW_SECONDS)
        found = dict[int, int]()
        for ref in told:
            with contextlib.suppress(RayError):
                found[counts.index(ref)] = ray.get(ref)
        turn, size = os.getpid(), len(counts)
        return self.engines[min(found or range(size), key=lambda i: (found.get(i, 0), (i + turn) % size))]
