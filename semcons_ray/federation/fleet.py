"""The interfaces between algorithms and where clients run: `Algorithm`, `Fleet`, `Host`, and `Reply`, a visit's result.

A visit is a client's part of a round, from its last state to its reply. `LocalFleet` visits clients one by one in this
process; `distributed.RayFleet` visits them in Ray actors. Both give the same replies for the same seed, since a visit
is a pure function of the client's last state, the round and the downlink message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from semcons_ray.data.examples import Example
from semcons_ray.errors import ClientError, QuorumError, UserError
from semcons_ray.evaluation.harness import TaskScore
from semcons_ray.metering.energy import EnergyWindow, NodeMeter
from semcons_ray.metering.ledger import LedgerRow, Place
from semcons_ray.modeling.adapter import Adapter

if TYPE_CHECKING:  # the driver and the server run algorithms without loading transformers
    from semcons_ray.federation.client import Client
    from semcons_ray.federation.server import ServerProtocol, Verdict


NO_EXAMPLES: Mapping[int, Sequence[Example]] = {}
NO_OTHERS: Mapping[int, bytes] = {}


class Evaluation(msgspec.Struct, frozen=True):
    """How a client's model does on the test set: a measurement by the simulator, not a message of the protocol.

    Attributes:
        nll: Negative log-likelihood (nats) of the reference answer to each of N test prompts, summed over its tokens;
            empty, as the next two, if the model does not tell how likely it finds a text.
        num_tokens: How many tokens each of those has, (N,).
        num_bytes: Length of each as UTF-8, which does not depend on the tokenizer, (N,).
        answers: Generated answers to the first `evaluation.num_answers` test prompts.
        option_nll: Negative log-likelihood (nats) of each option of each test prompt, (N,); empty if not asked for.
        tasks: Scores in tasks of lm-eval, if they were asked for.
    """

    nll: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_bytes: tuple[int, ...]
    answers: tuple[str, ...]
    option_nll: tuple[tuple[float, ...], ...] = ()
    tasks: tuple[TaskScore, ...] = ()

    @property
    def nll_sum(self) -> float:
        """The sum of `nll`."""
        return sum(self.nll)


class Reply(msgspec.Struct, frozen=True):
    """What comes back from a visit. Only `uplink` belongs to the protocol; the rest is measurement.

    Attributes:
        client_id: The client.
        round: The round.
        uplink: The encoded message to the server; empty if the client sends none.
        train_loss: Mean training loss (nats a token) of the round; NaN if nothing was trained.
        num_private: Private examples of the client.
        num_pseudo_labels: Pseudo-labels that it trained on.
        evaluation: Its model's evaluation, if one was asked for.
        rows: The ledger's rows of this visit.
    """

    client_id: int
    round: int
    uplink: bytes
    train_loss: float
    num_private: int
    num_pseudo_labels: int
    evaluation: Evaluation | None
    rows: tuple[LedgerRow, ...]


class Algorithm(Protocol):
    """A federated algorithm, which `runs.experiment` runs round by round. The first to read is
    semantic_consensus.py."""

    @property
    def uses_public_prompts(self) -> bool:
        """Whether clients are sent the public prompts."""
        ...

    def first_state(self) -> bytes:
        """The server's state before round 1. An algorithm encodes it as it likes; nothing else reads it."""
        ...

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The encoded message that each of these clients gets at the start of a round."""
        ...

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """The server's part of a round: have participants visited, and make the state for the next round.

        Args:
            round: The round, from 1.
            state: The server's state after the round before.
            fleet: Visits clients.
            server: Forms the consensus, where the algorithm uses one.
            evaluate: Whether models are measured on the test set.

        Raises:
            QuorumError: Too few clients answered.
        """
        ...

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """The client's part of a round: takes the encoded downlink message, returns the encoded uplink message."""
        ...

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Give the client the model with which it starts the round, without training it."""
        ...


@dataclass(frozen=True)
class RoundOutcome:
    """The outcome of a round.

    Attributes:
        replies: Replies of the participants, in the order of client ids.
        next_state: The server's state for the next round.
        evaluations: By client id, the evaluation of the client's model after the round, where it was measured.
        verdict: The consensus; None where an algorithm forms none.
        rows: Ledger rows of work that is in no reply and no verdict.
    """

    replies: tuple[Reply, ...]
    next_state: bytes
    evaluations: Mapping[int, Evaluation | None]
    verdict: Verdict | None = None
    rows: tuple[LedgerRow, ...] = ()


def own_evaluations(replies: Sequence[Reply]) -> dict[int, Evaluation | None]:
    """The evaluations made in the visits: those of algorithms in which each client keeps a model of its own."""
    return {reply.client_id: reply.evaluation for reply in replies}


class Visitor(Protocol):
    """What an algorithm may ask of a fleet."""

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Host.adapter_shapes`. It is that of any worker: clients that exchange adapters have one architecture."""
        ...

    @property
    def first_adapter(self) -> Adapter:
        """See `Host.first_adapter`; it is that of any worker, too. A server that knows the model and the seed can make
        it, so no message has it."""
        ...

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """Visit the clients in `downlinks`, each with its message, and yield replies in the order in which they come.

        A client that dies or is too slow is tried again from its last state, up to a limit, and then left out; one
        whose numbers are no longer finite is left out at once. `Fleet.lost` lists those that were left out.

        Raises:
            QuorumError: Fewer clients answered than the quorum asks for.
        """
        ...

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        """Count clients as lost whose replies in a round turned out to be unusable, with a reason for each.

        Raises:
            QuorumError: Without them, fewer clients have answered than the quorum asks for.
        """
        ...

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        """Evaluate, for each client in `downlinks`, the model that it has once it gets its message after `round`.

        Nothing is trained, sent or kept.

        Raises:
            QuorumError: Fewer clients answered than the quorum asks for.
        """
        ...


class HandsOn:
    """A visitor that hands all that it is asked on to another; subclasses do something besides.

    Args:
        visitor: The other.
    """

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Visitor.adapter_shapes`."""
        return self._visitor.adapter_shapes

    @property
    def first_adapter(self) -> Adapter:
        """See `Visitor.first_adapter`."""
        return self._visitor.first_adapter

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """See `Visitor.visit`."""
        return self._visitor.visit(round, downlinks, evaluate=evaluate)

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        """See `Visitor.leave_out`."""
        self._visitor.leave_out(round, reasons)

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        """See `Visitor.measure`."""
        return self._visitor.measure(round, downlinks)


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
        """Names of the energy meters by node; an empty name where a node has none."""
        ...

    def laps(self) -> list[EnergyWindow]:
        """How much each energy counter of each metered node went up since the last call."""
        ...

    def measure(
        self, round: int, downlinks: Mapping[int, bytes], examples: Mapping[int, Sequence[Example]] = NO_EXAMPLES
    ) -> Iterator[Reply]:
        """See `Visitor.measure`; where a client has `examples`, they are scored instead of the test set, and nothing
        else."""
        ...

    def export_adapters(self, round: int, downlinks: Mapping[int, bytes], folder: Path) -> None:
        """Write, for PEFT, the adapter with which each client in `downlinks` would start `round` to folder/client_NNN.

        Nothing may be asked of the fleet afterwards but `close`.
        """
        ...

    def close(self) -> None:
        """Free what the fleet holds."""
        ...


class HostSpecProtocol(Protocol):
    """What workers of a model build their hosts from; it is sent to each once."""

    @property
    def environment(self) -> tuple[str, ...]:
        """Names of environment variables that the worker needs besides those that all have."""
        ...

    def build(self, worker: str) -> Host:
        """Load what the host of a worker needs."""
        ...


class Host(Protocol):
    """A process that can be asked for any client of one model."""

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of an adapter of its model, at the model's own rank; empty where it has none."""
        ...

    @property
    def first_adapter(self) -> Adapter:
        """The adapter from which all clients of its model start, at the model's own rank."""
        ...

    def visit(
        self, client_id: int, round: int, downlink: bytes, evaluate: bool, beside: Mapping[int, bytes] = NO_OTHERS
    ) -> Reply:
        """Visit one client; where it trains together with others, `beside` has their messages, and their replies are
        there when they are visited next."""
        ...

    def measure(self, client_id: int, round: int, downlink: bytes, examples: Sequence[Example] = ()) -> Reply:
        """Evaluate the model that a client has once it gets `downlink` after a round; see `ClientHost.measure`."""
        ...

    def export_adapter(self, client_id: int, round: int, downlink: bytes, folder: Path) -> None:
        """Write the adapter with which a client would start `round` to `folder`, in PEFT's format."""
        ...

    def lent(self, client_id: int, files: Mapping[str, bytes]) -> AbstractContextManager[dict[str, bytes]]:
        """See `store.ClientStore.lent`."""
        ...

    def keep(self, client_id: int, files: Mapping[str, bytes]) -> None:
        """See `store.ClientStore.put`; they are kept until they are lent."""
        ...


class LocalFleet:
    """Visits clients one by one, in order, in this process.

    Args:
        hosts: Hosts by worker name, one for each base model.
        clients: Ids of the clients of each host, by worker name.
        place: Where this process computes.
        quorum: Share of the clients visited that must answer, 0 to 1.
        meter: Energy meter of this machine; None: its energy is estimated.
        train_together: How many clients of a host train together.
    """

    def __init__(
        self,
        hosts: Mapping[str, Host],
        clients: Mapping[str, Sequence[int]],
        *,
        place: Place,
        quorum: float,
        meter: NodeMeter | None = None,
        train_together: int = 1,
    ) -> None:
        self._hosts = hosts
        self._clients = clients
        self._quorum = quorum
        self._meter = meter
        self._train_together = train_together
        self.lost: Mapping[int, str] = {}
        self._num_asked = 0
        self.workers: Mapping[str, Place] = dict.fromkeys(hosts, place)
        self.meters: Mapping[str, str] = {place.node: meter.name if meter else ""}

    @property
    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Visitor.adapter_shapes`."""
        return next(iter(self._hosts.values())).adapter_shapes

    @property
    def first_adapter(self) -> Adapter:
        """See `Visitor.first_adapter`."""
        return next(iter(self._hosts.values())).first_adapter

    def laps(self) -> list[EnergyWindow]:
        """See `Fleet.laps`."""
        return self._meter.lap() if self._meter else []

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        """See `Fleet.visit`. There is no process to restart here: a client that fails is left out at once."""
        beside: dict[int, dict[int, bytes]] = {}
        for clients in self._clients.values():
            for first, *others in in_groups([c for c in downlinks if c in clients], self._train_together):
                beside[first] = {other: downlinks[other] for other in others}
        return self._ask(
            round,
            downlinks,
            lambda host, client, downlink: host.visit(client, round, downlink, evaluate, beside.get(client, NO_OTHERS)),
        )

    def measure(
        self, round: int, downlinks: Mapping[int, bytes], examples: Mapping[int, Sequence[Example]] = NO_EXAMPLES
    ) -> Iterator[Reply]:
        """See `Fleet.measure`."""
        return self._ask(
            round,
            downlinks,
            lambda host, client, downlink: host.measure(client, round, downlink, examples.get(client, ())),
        )

    def _ask(
        self, round: int, downlinks: Mapping[int, bytes], call: Callable[[Host, int, bytes], Reply]
    ) -> Iterator[Reply]:
        lost: dict[int, str] = {}
        self.lost, self._num_asked = lost, len(downlinks)
        for client_id, downlink in downlinks.items():
            try:
                reply = call(self._host_of(client_id), client_id, downlink)
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
            self._host_of(client_id).export_adapter(client_id, round, downlink, folder / client_folder(client_id))

    def close(self) -> None:
        """Drop the models."""
        self._hosts = {}

    def _host_of(self, client_id: int) -> Host:
        return next(self._hosts[worker] for worker, clients in self._clients.items() if client_id in clients)


def in_groups(clients: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Clients in groups of `size` that train together, in their order; the last may be smaller."""
    return [tuple(clients[start : start + size]) for start in range(0, len(clients), size)]


def check_quorum(round: int, num_asked: int, lost: Mapping[int, str], quorum: float) -> None:
    """Check that enough clients of a round answered.

    Args:
        round: The round, for the message.
        num_asked: How many clients were asked.
        lost: Those that did not answer, and why.
        quorum: Share of the clients asked that must answer, 0 to 1; one must in any case.

    Raises:
        QuorumError: Fewer answered; the message gives the reasons.
    """
    answered = num_asked - len(lost)
    if lost and (answered < quorum * num_asked or answered == 0):
        reasons = "; ".join(f"client {client}: {reason}" for client, reason in sorted(lost.items()))
        raise QuorumError(
            f"round {round}: {answered} of {num_asked} clients answered, and failures.quorum is {quorum:g}. {reasons}"
        )


def client_folder(client_id: int) -> str:
    """Name of a client's folder: client_NNN."""
    return f"client_{client_id:03d}"
