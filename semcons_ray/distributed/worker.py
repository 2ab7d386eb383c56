"""The Ray actors: a worker that hosts clients, and the server. The plain classes inside them do not use Ray."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ray

from semcons_ray.data.examples import Example
from semcons_ray.distributed.cluster import NO_CODE, begin, keep_to_booked_memory
from semcons_ray.errors import ClientError, UserError
from semcons_ray.federation.fleet import Host, HostSpecProtocol, Reply
from semcons_ray.federation.server import Server, ServerSpec, Verdict
from semcons_ray.federation.store import Files, read_files, sees_mark
from semcons_ray.federation.weights import pack
from semcons_ray.metering.energy import EnergyWindow, NodeMeter, open_meters
from semcons_ray.metering.gpus import this_place
from semcons_ray.metering.ledger import LedgerRow, Place
from semcons_ray.tracking.run_log import LogAfar, join_run_log

logger = logging.getLogger(__name__)


class Arrival(NamedTuple):
    """What a worker says first.

    Attributes:
        place: Where it computes.
        sees_folder: Whether it sees the folder of clients' states that the driver marked.
    """

    place: Place
    sees_folder: bool


class Answer(NamedTuple):
    """What a worker returns, as MessagePack: Ray would pickle anything but bytes, which takes longer. A file may thus
    have up to 4 GiB.

    Attributes:
        reply: The encoded `Reply`; that of nothing is of no use.
        files: Files by name, which the driver is to write, since the worker does not see the run's folder.
        log: Lines of the run's log, for the same reason.
    """

    reply: bytes
    files: Files
    log: str

    def encode(self) -> bytes:
        """The bytes that `decode` takes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, encoded: bytes) -> Answer:
        """The answer that was encoded."""
        return _ANSWER.decode(encoded)


NO_FILES: Mapping[int, Files | None] = {}

_ANSWER = msgspec.msgpack.Decoder(Answer)


@ray.remote
class WorkerActor:
    """A process that hosts clients of one model, with `variables` of the driver's environment and its `code`.

    Loading is not done in the constructor: an error there reaches the driver as a dead actor, without the message that
    says what to change.
    """

    def __init__(self, variables: Mapping[str, str], code: Mapping[str, bytes] = NO_CODE) -> None:
        begin(variables, code)
        self._host: Host | None = None
        self._failure: Exception | None = None
        self._log = LogAfar()
        self._meter: NodeMeter | None = None
        self._rendezvous: Any = None

    def open_rendezvous(self, num_ranks: int) -> str:
        """On the first rank of a group: open the address at which all its ranks are to `join`."""
        from semcons_ray.modeling.ranks import open_rendezvous

        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._rendezvous, address = open_rendezvous(host, num_ranks)
        return address

    def join(self, rank: int, num_ranks: int, address: str) -> None:
        """Join a group of ranks, which then load a model together."""
        from semcons_ray.modeling.ranks import join_ranks

        join_ranks(rank, num_ranks, address, self._rendezvous)

    def arrive(self, uses_gpu: bool, folder: Path, mark: str) -> Arrival:
        """Where it is. It is asked that first, since an answer means that the cluster had room for it.

        Args:
            uses_gpu: Whether it uses a GPU.
            folder: The folder of clients' states.
            mark: Name of the file by which the driver marked it; see `store.mark`.
        """
        return Arrival(this_place(uses_gpu=uses_gpu), sees_mark(folder, mark))

    def load(self, spec: HostSpecProtocol, worker: str) -> dict[str, tuple[int, ...]]:
        """Load the model, as the worker of this name; returns `Host.adapter_shapes`."""
        self._log = join_run_log(worker)
        try:
            keep_to_booked_memory()
            self._host = spec.build(worker)
            return dict(self._host.adapter_shapes)
        except UserError as error:
            self._failure = error
            raise
        except Exception as error:
            logger.error("%s could not load", worker, exc_info=error)
            self._failure = ClientError(f"{worker} could not load: {type(error).__name__}: {error}")
            raise self._failure from error

    def first_adapter(self) -> bytes:
        """See `Host.first_adapter`; its tensors are returned as safetensors."""
        return pack(self._loaded().first_adapter, "float32")

    def visit(
        self,
        client_id: int,
        round: int,
        downlink: bytes,
        evaluate: bool,
        files: Files | None = None,
        beside: Mapping[int, Files | None] = NO_FILES,
        *downlinks: bytes,
    ) -> bytes:
        """See `Host.visit`; returns an encoded `Answer`, as the next two do.

        Args:
            client_id: The client.
            round: The round.
            downlink: Its message.
            evaluate: Whether it is evaluated.
            files: The files of its state, if this process does not see the folder in which they are.
            beside: The clients that train together with it, with their files likewise.
            downlinks: Their messages.
        """
        for other, of_other in beside.items():
            if of_other is not None:  # they stay, with what the visit adds, until that client is visited
                self._loaded().keep(other, of_other)
        others = dict(zip(beside, downlinks, strict=True))
        return self._answer(client_id, files, lambda host: host.visit(client_id, round, downlink, evaluate, others))

    def measure(
        self,
        client_id: int,
        round: int,
        downlink: bytes,
        examples: Sequence[Example] = (),
        files: Files | None = None,
    ) -> bytes:
        """See `Host.measure`, and `visit` for `files`."""
        return self._answer(client_id, files, lambda host: host.measure(client_id, round, downlink, examples))

    def export_adapter(
        self, client_id: int, round: int, downlink: bytes, folder: Path, files: Files | None = None
    ) -> bytes:
        """See `Host.export_adapter`, and `visit` for `files`. Without the folder, the adapter's files are returned."""
        if files is None:
            self._loaded().export_adapter(client_id, round, downlink, folder)
            return Answer(b"", {}, self._log.take()).encode()
        host = self._loaded()
        with tempfile.TemporaryDirectory(prefix="semcons-adapter-") as made, host.lent(client_id, files):
            host.export_adapter(client_id, round, downlink, Path(made))
            return Answer(b"", read_files(Path(made)), self._log.take()).encode()

    def _answer(self, client_id: int, files: Files | None, ask: Callable[[Host], Reply]) -> bytes:
        """What the host answers, and the files of the client's state that changed, if they were given; encoded."""
        host = self._loaded()
        if files is None:
            return Answer(msgspec.msgpack.encode(ask(host)), {}, self._log.take()).encode()
        with host.lent(client_id, files) as changed:
            encoded = msgspec.msgpack.encode(ask(host))
        return Answer(encoded, changed, self._log.take()).encode()

    def start_meter(self, node: str, uses_gpu: bool) -> str:
        """Meter this node's energy from now on; returns the meters' names, empty if the node has none."""
        self._meter = NodeMeter(node, open_meters(uses_gpu=uses_gpu))
        return self._meter.name

    def lap(self) -> list[EnergyWindow]:
        """How much each energy counter of the node went up since the last lap."""
        return self._meter.lap() if self._meter is not None else []

    def _loaded(self) -> Host:
        if self._host is None:
            raise self._failure or ClientError("visited before it was loaded")
        return self._host


@ray.remote
class ServerActor:
    """A process that embeds answers and forms the consensus, with `variables` of the driver's environment and its
    `code`."""

    def __init__(self, variables: Mapping[str, str], code: Mapping[str, bytes] = NO_CODE) -> None:
        begin(variables, code)
        self._server: Server | None = None
        self._failure: Exception | None = None

    def place(self, uses_gpu: bool) -> Place:
        """Where it computes, once the cluster had room for it."""
        return this_place(uses_gpu=uses_gpu)

    def load(self, spec: ServerSpec) -> None:
        """Load the embedding model."""
        join_run_log("server")
        try:
            keep_to_booked_memory()
            self._server = spec.build()
        except Exception as error:
            logger.error("the server could not load", exc_info=error)
            self._failure = error
            raise

    def begin(self, round: int, client_ids: Sequence[int], kept: bytes) -> None:
        """See `Server.begin`."""
        self._loaded().begin(round, client_ids, kept)

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None) -> None:
        """See `Server.collect`."""
        self._loaded().collect(client_id, uplink, asked_in)

    def conclude(self) -> Verdict:
        """See `Server.conclude`."""
        return self._loaded().conclude()

    def similarity(self, round: int, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """See `Server.similarity`."""
        return self._loaded().similarity(round, predictions, references)

    def take_rows(self) -> list[LedgerRow]:
        """See `Server.take_rows`."""
        return self._loaded().take_rows()

    def _loaded(self) -> Server:
        if self._server is None:
            raise self._failure or RuntimeError("asked before it was loaded")
        return self._server
