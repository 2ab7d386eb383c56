"""FedAvg on LoRA adapters: the server averages A and B over clients, and sends them back.

Source: J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), arXiv:2305.05644;
the average is H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(FedAvg), arXiv:1602.05629: weighted by the number of private examples.

A client starts each round from the average, with its optimizer afresh unless `training.keep_optimizer` is set; in round
1 all start from the same random A, and B = 0, which the seed tells them. The other weight baselines are this one with
another way to adopt, to train or to aggregate.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from semcons_ray.errors import ConfigError, MessageError, NotFiniteError
from semcons_ray.federation.algorithms.local_only import own_labels
from semcons_ray.federation.fleet import Evaluation, Reply, RoundOutcome, Visitor
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerProtocol
from semcons_ray.federation.weights import (
    Shapes,
    check_shapes,
    pack,
    packed_bytes,
    shapes_at,
    shapes_of,
    unpack,
    weighted_mean,
)
from semcons_ray.messages import (
    NO_LABELS,
    AdapterUpdate,
    GlobalAdapter,
    PseudoLabels,
    decode_downlink,
    decode_uplink,
    naming,
)
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.adapter import Adapter

if TYPE_CHECKING:  # the driver runs algorithms without loading transformers
    from semcons_ray.federation.client import Client
    from semcons_ray.modeling.language_model import Adjust


@dataclass(frozen=True)
class FedAvgLora:
    """One round, top to bottom.

    Attributes:
        cohort: Who takes part in a round.
        ranks: LoRA rank of each client, (C,).
        dtype: Of tensors on the wire: "float32", "float16" or "bfloat16".
        compression: Of messages, "none" or "zstd".
        self_labels: Whether clients also train on their own answers to the public prompts, so as to have seen what the
            clients of a semantic consensus see.
        label_weight: Weight in the loss of such a label beside a private example.
        exchanges: Rounds in which those would answer; own answers are learnt after the first of them, too.
    """

    cohort: Cohort
    ranks: tuple[int, ...]
    dtype: str = "float16"
    compression: str = "none"
    self_labels: bool = False
    label_weight: float = 1.0
    exchanges: range = range(1, 2)

    @property
    def uses_public_prompts(self) -> bool:
        """Only to label them."""
        return self.self_labels

    def first_state(self) -> bytes:
        """Nothing is averaged yet."""
        return b""

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Send the average out, let participants train, average anew, and measure that.

        Args:
            round: From 1.
            state: What `aggregate` returned the round before.
            fleet: The clients.
            server: Not used: an average needs no embedding.
            evaluate: Whether the new average is measured on the test set.

        Raises:
            QuorumError: Too few clients answered.
        """
        visits = fleet.visit(round, self.downlinks(round, state, self.cohort.sample(round)), evaluate=False)
        replies = tuple(sorted(visits, key=lambda reply: reply.client_id))
        ledger = Ledger("driver", socket.gethostname())
        with ledger.stage("aggregate", round=round):
            updates = self.usable(round, replies, fleet)
            # In the order of their contents: sums round as their order is, and who is called what changes no result.
            updates.sort(key=lambda update: (update.tensors, update.num_examples))
            state = self.aggregate(round, state, updates)
        rows = ledger.take()
        evaluations: dict[int, Evaluation | None] = {}
        if evaluate:  # clients of one rank have the same model then, so it is measured once
            first = {rank: client for client, rank in reversed([*enumerate(self.ranks)])}
            for reply in fleet.measure(round, self.downlinks(round + 1, state, sorted(first.values()))):
                same = [client for client, rank in enumerate(self.ranks) if rank == self.ranks[reply.client_id]]
                evaluations |= dict.fromkeys(same, reply.evaluation)
                rows += reply.rows
        return RoundOutcome(replies=replies, next_state=state, evaluations=evaluations, rows=tuple(rows))

    def usable(self, round: int, replies: Sequence[Reply], fleet: Visitor) -> list[AdapterUpdate]:
        """The updates that are what they must be; clients that sent others are left out of the round.

        Raises:
            QuorumError: Too few are left.
        """
        updates, refused = [], {}
        for reply in replies:
            try:
                updates.append(self.received(reply, fleet.adapter_shapes))
            except MessageError as error:
                refused[reply.client_id] = str(error)
        if refused:
            fleet.leave_out(round, refused)
        return updates

    def received(self, reply: Reply, shapes: Shapes) -> AdapterUpdate:
        """What a client has sent.

        Args:
            reply: The client's, with the encoded `AdapterUpdate`.
            shapes: Of an adapter, at any rank.

        Raises:
            MessageError: It is no update of this client and round, or its tensors are not finite or not those expected;
                names the client.
        """
        expected = self.exchanged(shapes_at(shapes, self.ranks[reply.client_id]))
        who = {"client_id": reply.client_id, "round": reply.round}
        update = decode_uplink(AdapterUpdate, reply.uplink, **who, max_bytes=packed_bytes(expected))
        with naming(**who):
            check_shapes(unpack(update.tensors), expected)
        return update

    def exchanged(self, shapes: Shapes) -> Shapes:
        """What of an adapter of these shapes crosses the wire, either way: all of it."""
        return shapes

    def aggregate(self, round: int, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The mean of A and of B, weighted by private examples; the next state."""
        adapters = [unpack(update.tensors) for update in updates]
        return pack(weighted_mean(adapters, [update.num_examples for update in updates]), "float32")

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The average, as each client gets it; encoded once a rank."""
        if not state:
            return dict.fromkeys(client_ids, b"")
        encoded: dict[int, bytes] = {}
        for rank in {self.ranks[client_id] for client_id in client_ids}:
            tensors = self.packed(self.share(unpack(state), rank))
            encoded[rank] = GlobalAdapter(round_number=round - 1, tensors=tensors).encode(self.compression)
        return {client_id: encoded[self.ranks[client_id]] for client_id in client_ids}

    def packed(self, tensors: Adapter) -> bytes:
        """What the server sends, in the type that goes over the wire.

        Raises:
            ConfigError: A number does not fit it.
        """
        try:
            return pack(tensors, self.dtype)
        except NotFiniteError as error:
            raise ConfigError(f"what the server sends: {error}") from error

    def share(self, average: Adapter, rank: int) -> Adapter:
        """What of the average a client of `rank` is sent: all of it, since ranks are equal."""
        return average

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """The client's part: start from the average, train, and send the adapter back."""
        self.adopt(client, round, downlink)
        client.fine_tune(
            round,
            self.labels(client, round),
            weight=self.label_weight,
            downlink_bytes=len(downlink),
            adjust=self.adjust(client),
        )
        return client.upload(round, self.trained(client), self.dtype, self.compression)

    def labels(self, client: Client, round: int) -> PseudoLabels:
        """The client's own answers to the public prompts, if it is to learn them."""
        return own_labels(client, round, self.exchanges) if self.self_labels else NO_LABELS

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Take the average for the client's adapter; before there is one, the common beginning."""
        fresh = client.fresh_adapter()
        client.adapter = {**fresh, **self.sent(round, downlink, self.exchanged(shapes_of(fresh)))}

    def sent(self, round: int, downlink: bytes, expected: Shapes) -> Adapter:
        """The tensors of an encoded `GlobalAdapter`; none before there is one.

        Raises:
            MessageError: It is no such message of an earlier round, or its tensors are not finite or others.
        """
        if not downlink:
            return {}
        tensors = unpack(decode_downlink(GlobalAdapter, downlink, round=round).tensors)
        check_shapes(tensors, expected)
        return tensors

    def adjust(self, client: Client) -> Adjust | None:
        """What is done to gradients before each step: nothing."""
        return None

    def trained(self, client: Client) -> Adapter:
        """What is sent of the client's adapter: all of it."""
        return client.adapter
