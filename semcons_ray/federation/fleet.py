"""What an algorithm sees of the world: clients it can visit, a fleet that visits many, and what comes back.

`LocalFleet` visits clients one by one in this process; `distributed.RayFleet` visits them as Ray actors. Both give
the same replies for the same seed, since a visit is a pure function of the client's last state, the round and the
downlink message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from semcons_ray.errors import ClientError, QuorumError, UserError
from semcons_ray.metering.energy import EnergyWindow, NodeMeter
from semcons_ray.metering.ledger import LedgerRow, Place

if TYPE_CHECKING:  # the driver and the server run algorithms without loading transformers
    from semcons_ray.federation.client import Client
    from semcons_ray.federation.server import ServerProtocol, Verdict


class Evaluation(msgspec.Struct, frozen=True):
    """A client's model on the common test set: a measurement of the simulator, no message of the protocol.

    Attributes:
        nll_sum: Negative log-likelihood (nats), summed over response tokens of the reference answers.
        num_tokens: How many response tokens those are.
        num_bytes: Bytes, as UTF-8, of the text of the responses: what crosses tokenizers.
        answers: Generated answers to the first `evaluation.num_answers` test prompts.
    """

    nll_sum: float
    num_tokens: int
    num_bytes: int
    answers: tuple[str, ...]


class Reply(msgspec.Struct, frozen=True):
    """What comes back from a visit; only `uplink` is the protocol's, the rest is measurement."""

    client_id: int
    round: int
    uplink: bytes
    train_loss: float
    num_private: int
    num_pseudo_labels: int
    evaluation: Evaluation | None
    rows: tuple[LedgerRow, ...]


class Algorithm(Protocol):
    """What `runs.experiment` runs round by round; see semantic_consensus.py for the one to read first."""

    @property
    def uses_public_prompts(self) -> bool:
        """Whether clients are sent the public prompts."""
        ...

    def first_state(self) -> bytes:
        """What the server takes into round 1."""
        ...

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The encoded message that each of these clients gets at the start of a round."""
        ...

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """The server's part of a round: visits participants, and says what the server takes into the next."""
        ...

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """The client's part of a round: takes the encoded downlink message, returns the encoded uplink message."""
        ...

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Make the client's model the one that it starts the round with."""
        ...


@dataclass(frozen=True)
class RoundOutcome:
    """What a round came to.

    Attributes:
        replies: Of the participants, by client id.
        next_state: What the server takes into the next round.
        evaluations: Of the model that each client has after the round, where it was measured.
        verdict: The consensus; None where an algorithm forms none.
        rows: Work that is in no reply and no verdict.
    """

    replies: tuple[Reply, ...]
    next_state: bytes
    evaluations: Mapping[int, Evaluation | None]
    verdict: Verdict | None = None
    rows: tuple[LedgerRow, ...] = ()


def own_evaluations(replies: Sequence[Reply]) -> dict[int, Evaluation | None]:
    """For algorithms that leave each client a model of its own: what each visit measured."""
    return {reply.client_id: reply.evaluation for reply in replies}


class Visitor(Protocol):
    """All that an algorithm may ask of a fleet."""

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Host.adapter_shapes`; of any worker, since who exchanges adapters has one architecture."""
        ...

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """Visit the clients named, with a downlink message each; replies come as they are ready.

        A client that dies or is too slow is tried again from its last state, up to a limit, then left out; one whose
        numbers are no longer finite is left out at once. `Fleet.lost` has them.

        Raises:
            QuorumError: Fewer clients answered than the quorum asks for.
        """
        ...

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        """Count clients as lost whose replies to the visit of a round turned out to be of no use.

        Raises:
            QuorumError: Without them fewer clients have answered than the quorum asks for.
        """
        ...

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        """Evaluate the model that each client named makes of a message; nothing is trained, sent or kept.

        Raises:
            QuorumError: Fewer clients answered than the quorum asks for.
        """
        ...


class Fleet(Visitor, Protocol):
    """Clients that can be visited, wherever they are."""

    @property
    def workers(self) -> Mapping[str, Place]:
        """Where each worker is, by name."""
        ...

    @property
    def lost(self) -> Mapping[int, str]:
        """Clients left out of the last visit or measurement, and why."""
        ...

    @property
    def meters(self) -> Mapping[str, str]:
        """Names of the energy meters by node; empty where a node has none."""
        ...

    def laps(self) -> list[EnergyWindow]:
        """What each counter of each metered node went up by since the last call."""
        ...

    def export_adapters(self, round: int, downlinks: Mapping[int, bytes], folder: Path) -> None:
        """Write the adapter that each client named would start `round` with to `folder`/client_NNN, for PEFT.

        The last thing that may be asked of a fleet.
        """
        ...

    def close(self) -> None:
        """Free what the fleet holds."""
        ...


class HostSpecProtocol(Protocol):
    """How a worker makes its host; crosses to the worker once."""

    @property
    def worker(self) -> str:
        """Name of the worker."""
        ...

    def build(self) -> Host:
        """Load what the host needs."""
        ...


class Host(Protocol):
    """One process's worth of clients."""

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of an adapter of its model, at the model's own rank."""
        ...

    def visit(self, client_id: int, round: int, downlink: bytes, evaluate: bool) -> Reply:
        """Visit one client."""
        ...

    def measure(self, client_id: int, round: int, downlink: bytes) -> Reply:
        """Evaluate the model that a client makes of a message after a round."""
        ...

    def export_adapter(self, client_id: int, round: int, downlink: bytes, folder: Path) -> None:
        """Write the adapter that a client would start `round` with to `folder`."""
        ...


class LocalFleet:
    """Visits clients one by one, in order, in this process.

    Args:
        hosts: One a base model, by worker name.
        clients: Ids of the clients of each host.
        place: Where this process computes.
        quorum: Share of the clients visited that must answer.
        meter: Of this machine, if its energy is metered.
    """

    def __init__(
        self,
        hosts: Mapping[str, Host],
        clients: Mapping[str, Sequence[int]],
        *,
        place: Place,
        quorum: float,
        meter: NodeMeter | None = None,
    ) -> None:
        self._hosts = hosts
        self._host_of = {client: hosts[worker] for worker, ids in clients.items() for client in ids}
        self._quorum = quorum
        self._meter = meter
        self.lost: Mapping[int, str] = {}
        self._num_asked = 0
        self.workers: Mapping[str, Place] = dict.fromkeys(hosts, place)
        self.meters: Mapping[str, str] = {place.node: meter.name if meter else ""}

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Visitor.adapter_shapes`."""
        return next(iter(self._hosts.values())).adapter_shapes

    def laps(self) -> list[EnergyWindow]:
        """See `Fleet.laps`."""
        return self._meter.lap() if self._meter else []

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """See `Fleet.visit`. There is no process to restart here: a client that fails is left out at once."""
        return self._ask(round, downlinks, lambda host, client, downlink: host.visit(client, round, downlink, evaluate))

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        """See `Fleet.measure`."""
        return self._ask(round, downlinks, lambda host, client, downlink: host.measure(client, round, downlink))

    def _ask(
        self, round: int, downlinks: Mapping[int, bytes], call: Callable[[Host, int, bytes], Reply]
    ) -> Iterator[Reply]:
        lost: dict[int, str] = {}
        self.lost, self._num_asked = lost, len(downlinks)
        for client_id, downlink in downlinks.items():
            try:
                reply = call(self._host_of[client_id], client_id, downlink)
            except UserError:
                raise
            except ClientError as error:
                lost[client_id] = str(error)
            else:
                yield reply
        check_quorum(round, self._num_asked, lost, self._quorum)

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        """See `Visitor.leave_out`."""
        self.lost = {**self.lost, **reasons}
        check_quorum(round, self._num_asked, self.lost, self._quorum)

    def export_adapters(self, round: int, downlinks: Mapping[int, bytes], folder: Path) -> None:
        """See `Fleet.export_adapters`."""
        for client_id, downlink in downlinks.items():
            self._host_of[client_id].export_adapter(client_id, round, downlink, folder / client_folder(client_id))

    def close(self) -> None:
        """Drop the models."""
        self._hosts = {}
        self._host_of.clear()


def check_quorum(round: int, num_asked: int, lost: Mapping[int, str], quorum: float) -> None:
    """Raises QuorumError, with the reasons, where fewer than `quorum` of the clients asked have answered."""
    answered = num_asked - len(lost)
    if lost and (answered < quorum * num_asked or answered == 0):
        reasons = "; ".join(f"client {client}: {reason}" for client, reason in sorted(lost.items()))
        raise QuorumError(
            f"round {round}: {answered} of {num_asked} clients answered, and failures.quorum is {quorum:g}. {reasons}"
        )


def client_folder(client_id: int) -> str:
    """Name of a client's folder, client_NNN."""
    return f"client_{client_id:03d}"
