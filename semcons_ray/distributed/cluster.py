"""Starts a Ray cluster on this machine or joins a running one, and lists what is free on its nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from semcons_ray.distributed.placement import Node
from semcons_ray.errors import PlacementError, first_line
from semcons_ray.metering.environment import cpu_model, memory_limit_bytes, put_back, usable_cpus, with_variables
from semcons_ray.metering.gpus import IN_NVMLS_ORDER, Gpu, cuda_fault, list_gpus, visible_gpus
from semcons_ray.parts import unpack_code, use_code

CONNECT_SECONDS = 10.0

OBJECT_STORE_BYTES = 256 << 20
"""Size of the object store of a cluster started here: messages are small, and Ray's default is a third of the
memory."""

FLAT_MEMORY = {
    # oneDNN keeps a compiled kernel for each shape, 1,024 by default: batches of ever new lengths fill that.
    # This is enough for a training step; with far fewer, each layer would compile its kernels again.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # Fixed, so that the C library does not raise them by itself as it goes. As large as it allows: a block from the
    # first on has its pages cleared by the kernel each time, which for tensors of a training step costs a third of it.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""Environment variables that keep an actor's memory from growing with the work that it has done."""


PASSED_ON = (
    *("SEMCONS_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_", "XDG_CACHE_HOME"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_"),
    *("WANDB_", "MLFLOW_", "TRACKIO_"),
)
"""Beginnings of the names, in either case, of environment variables that workers need: where models, data and trackers
are, and the credentials for them."""

CODE = "SEMCONS_CODE"
NO_CODE: Mapping[str, bytes] = {}
"""The variable that tells an actor where the code of parts of one's own is."""


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start one on this machine if it is None, and leave it at the end of the block.

    A process that is part of a cluster already, as a trial of a sweep is, stays in that one.

    Raises:
        PlacementError: No cluster answers at `address`, it wants another token, or none can be started here.
    """
    if ray.is_initialized():
        yield
        return
    # Ray warns on each start that a later version will leave this variable alone for tasks without GPUs.
    quiet = with_variables({"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    with quiet, _own_token() if address is None else contextlib.nullcontext(), _no_handler_left():
        before = dict(os.environ)
        set_by_ray: list[str] = []  # such as PYTHONBREAKPOINT, by which breakpoint() would be Ray's debugger afterwards
        try:
            try:
                with _callers_sigterm(), _callers_random():
                    if address is None:
                        _start()
                    else:
                        _join(address)
            finally:
                set_by_ray += [name for name, value in os.environ.items() if before.get(name) != value]
            yield
        finally:
            with _callers_sigterm(), _callers_random():
                ray.shutdown()
            put_back({name: before.get(name) for name in set_by_ray})
            # Ray's own process remembers that clusters want a token, and which; one that the caller starts may not.
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """A token for a cluster that is started in the block; none if there is a token, or none is wanted."""
    with _naming_what_stops_a_start():
        wants_token = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
        tokens = AuthenticationTokenLoader.instance()
        tokens.reset_cache()  # it may remember a token of an earlier HOME, which Ray's other processes would not find
        needed = wants_token and not tokens.has_token(ignore_auth_mode=True)
    if not needed:
        yield
        return
    # Ray would write a token to HOME, which may not be writable, or where another run may be writing its own.
    with with_variables({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, replace=True):
        yield


def _start() -> None:
    with _naming_what_stops_a_start():
        ray.init(
            address="local",
            num_cpus=usable_cpus(),
            num_gpus=len(visible_gpus()) or None,  # Ray's own count takes the slices of a GPU for one
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


@contextlib.contextmanager
def _naming_what_stops_a_start() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, RayError) as error:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        said = _first_sentence(error)
        if not isinstance(error, RayError):
            said += f" (RAY_TMPDIR says where it keeps its files, now {folder})"
        if "AF_UNIX" in str(error):
            said = f"{folder} is too long a path for its sockets; set RAY_TMPDIR to a short one, such as /tmp"
        raise PlacementError(f"cannot start Ray on this machine: {said}") from error


def _join(address: str) -> None:
    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise PlacementError(
            f"cannot join a Ray cluster at resources.ray_address {address}: {_first_sentence(error)} (its token, if it "
            f"wants one, belongs in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names or in "
            f"~/.ray/auth_token; and RAY_AUTH_MODE=token has it shown)"
        ) from error


def _check_reachable(address: str) -> None:
    # Ray itself tries for minutes before it says that nobody answers, and does not say that a token was refused.
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        if "://" not in address:
            ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one the client would end the process
            GcsClient(address=address)


def _first_sentence(error: Exception) -> str:
    return first_line(error).partition(". ")[0]


@contextlib.contextmanager
def _callers_random() -> Iterator[None]:
    """Keep the state of Python's random numbers, of which Ray draws some."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _no_handler_left() -> Iterator[None]:
    """Where the caller has no handler of SIGTERM, take Ray's away at the end of the block."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _callers_sigterm() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM: Ray installs its own, which ends the process without a message."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # Ray sets no handler from other threads; and where there is none, Ray's is better than none
        return
    try:
        yield
    except SystemExit:  # raised by Ray's handler, if a signal came meanwhile
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def list_nodes() -> tuple[Node, ...]:
    """Nodes of the joined cluster with what is free on each; the driver's own node comes first.

    In a placement group, such as that of a trial which shares the cluster with others, its bundles take the place of
    nodes.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = sorted((entry for entry in nodes if entry["Alive"]), key=lambda entry: entry["NodeID"] != here)
    probed = [_whole_node() if entry["NodeID"] == here else _probe(entry["NodeID"]) for entry in alive]
    nodes_free = tuple(
        replace(
            ray.get(node) if isinstance(node, ray.ObjectRef) else node,
            node_id=entry["NodeID"],
            cpus=float(entry["Resources"].get("CPU", 0)),
            gpus=_shares(entry["Resources"].get("GPU", 0)),
        )
        for entry, node in zip(alive, probed, strict=True)
    )
    group = ray.util.get_current_placement_group()
    if group is None:
        return nodes_free
    memory = {entry["NodeID"]: entry["Resources"]["memory"] for entry in alive}
    return _list_bundles(group, {node.node_id: node.limited(int(memory[node.node_id])) for node in nodes_free})


def _list_bundles(group: PlacementGroup, nodes: Mapping[str, Node]) -> tuple[Node, ...]:
    """Bundles as nodes. A bundle with half of a node's GPUs, or of its cores, may plan with half of its memory."""
    node_of = placement_group_table(group)["bundles_to_node_id"]
    bundles = []
    for index, bundle in enumerate(group.bundle_specs):
        node = nodes[node_of[index]]
        cpus, gpus = bundle.get("CPU", 0.0), _shares(bundle.get("GPU", 0.0))
        share = sum(gpus) / len(node.gpus) if gpus else cpus / node.cpus
        bundles.append(
            replace(node, node_id=str(index), cpus=cpus, gpus=gpus, memory_bytes=int(node.memory_bytes * share))
        )
    return tuple(bundles)


def _shares(gpus: float) -> tuple[float, ...]:
    """A number of GPUs as Ray counts them, as a list of shares; the last may be a fraction."""
    rest = round(gpus % 1, 4)
    return (1.0,) * int(gpus) + ((rest,) if rest else ())


def this_node() -> Node:
    """This machine as a node, with the GPUs that this process sees."""
    return _describe(visible_gpus())


def _whole_node() -> Node:
    return _describe(list_gpus())


def _describe(gpus: Sequence[Gpu]) -> Node:
    free = min(psutil.virtual_memory().available, memory_limit_bytes() - psutil.Process().memory_info().rss)
    return Node(
        node_id="",
        name=socket.gethostname(),
        cpus=usable_cpus(),
        gpus=(1.0,) * len(gpus),
        memory_bytes=free,
        gpu_memory_bytes=min((int(gpu.memory_gib * 2**30) for gpu in gpus), default=None),
        gpu_watts=max((gpu.power_limit_watts or 0.0 for gpu in gpus), default=0.0),
        cpu_bfloat16=cpu_model()[1],
        gpu_bfloat16=all(gpu.bf16 for gpu in gpus),
        cuda_fault=cuda_fault(),
    )


def _probe(node_id: str) -> ray.ObjectRef[Node]:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(_whole_node).options(num_cpus=0, scheduling_strategy=strategy).remote()


def actor_options(*, node_id: str, threads: int, num_cpus: float, num_gpus: float) -> dict[str, Any]:
    """Ray's options for an actor.

    Threads beyond an actor's share of the cores made runs 3 to 10 times slower, so their number is set.

    Args:
        node_id: Node on which it runs while that node is alive; in a placement group, index of its bundle.
        threads: CPU threads of its process.
        num_cpus: Cores to book.
        num_gpus: Share of a GPU to book.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **FLAT_MEMORY,
        **IN_NVMLS_ORDER,
    }
    # Asked without a cluster, Ray would start one.
    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    strategy = (
        NodeAffinitySchedulingStrategy(node_id, soft=True)
        if group is None
        else PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=int(node_id))
    )
    return {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "scheduling_strategy": strategy,
        "runtime_env": {"env_vars": variables},
        # Ray puts an actor that books nothing on any node, whatever its strategy says.
        **({"memory": 1} if group is None and not num_cpus and not num_gpus else {}),
        # Ray's head keeps records of the last 100,000 calls for a dashboard: memory that would grow with visits.
        "enable_task_events": False,
    }


def see_booked_gpus() -> None:
    """In an actor's process, hide all GPUs but those that the actor has booked; call it before a GPU is used.

    Ray does so itself, unless RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES forbids it; then all actors would use the
    first GPU.
    """
    booked = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if booked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(booked)


def keep_to_booked_memory() -> None:
    """In an actor's process that has booked a part of a GPU: have torch take no more than that part of its memory.

    One that needs more than was planned then runs out of memory itself, and not whoever shares the GPU with it.
    """
    resources: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    share = resources.get("GPU", 0.0)
    if 0 < share < 1:
        import torch

        if torch.cuda.is_available():  # if not, whoever loads a model says so
            torch.cuda.set_per_process_memory_fraction(share)


def passed_on(needed: Sequence[str] = (), code: Path | None = None) -> dict[str, str]:
    """Environment variables of this process that workers need as well, and where they find code.

    Actors get them as an argument, since Ray writes runtime environments to its logs, and some of these are secrets.

    Args:
        needed: Names of variables, besides those of `PASSED_ON`.
        code: Folder with the code of parts of one's own, see `parts.keep_code`.
    """
    variables = {
        name: value for name, value in os.environ.items() if name.upper().startswith(PASSED_ON) or name in needed
    }
    return {**variables, CODE: str(code.resolve())} if code else variables


def begin(variables: Mapping[str, str], code: Mapping[str, bytes] = NO_CODE) -> None:
    """In an actor's process: take over what `passed_on` gave, and see no GPUs but those that the actor has booked.

    Args:
        variables: What `passed_on` gave.
        code: The files of the folder with code, for a process that does not see it.
    """
    os.environ.update(variables)
    if CODE in variables:
        folder = Path(variables[CODE])
        if not folder.is_dir():
            folder = unpack_code(code)
            os.environ[CODE] = str(folder)
        use_code(folder)
    see_booked_gpus()
