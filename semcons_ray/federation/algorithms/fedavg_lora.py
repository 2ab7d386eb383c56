"""FedAvg on LoRA adapters: the server averages A and B over clients, and sends them back.

Source: J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), arXiv:2305.05644;
the average is H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(FedAvg), arXiv:1602.05629: weighted by the number of private examples.

A client starts each round from the average, with a new optimizer unless `training.keep_optimizer` is set. In round 1
all start from the same random A, which follows from the seed, and B = 0.

Where late updates count, a round has those of few clients, some of which began from an older average. Then the average
moves towards theirs, by the share that they are of those asked, discounted by its age of t rounds by 1 / sqrt(1 + t)
(J. Nguyen et al., FedBuff, arXiv:2106.06639). That it moves towards their adapters, and not by how much these changed
since an average that the server would have to keep, is as in C. Xie et al., FedAsync, arXiv:1903.03934.

The other weight-averaging baselines are subclasses that replace how a client takes the average over, how it trains, or
how the server aggregates.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
    """FedAvg on LoRA adapters; the methods are in the order in which a round calls them.

    Attributes:
        cohort: Who takes part in a round.
        ranks: LoRA rank of each client, (C,).
        dtype: Type of tensors in messages: "float32", "float16" or "bfloat16".
        compression: Compression of messages: "none" or "zstd".
        self_labels: Whether clients also train on their own answers to the public prompts, so that they have seen the
            same prompts as clients of semantic consensus.
        label_weight: Weight of such an answer in the loss, where a private example has 1.
        exchanges: Rounds in which clients of semantic consensus would answer; own answers are learnt from the round
            after the first of them.
    """

    cohort: Cohort
    ranks: tuple[int, ...]
    dtype: str = "float16"
    compression: str = "none"
    self_labels: bool = False
    label_weight: float = 1.0
    exchanges: range = range(1, 2)

    averages_weights: ClassVar[bool] = True
    can_hear_late: ClassVar[bool] = True

    @property
    def uses_public_prompts(self) -> bool:
        """Only for `self_labels`."""
        return self.self_labels

    def first_state(self) -> bytes:
        """Empty: nothing is averaged yet."""
        return b""

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Send the average out, let participants train, and average again; the new average is what is evaluated.

        Args:
            round: The round, from 1.
            state: What `aggregate` returned in the round before.
            fleet: Visits clients.
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
            # In the order of their contents: a sum's rounding depends on its order, and ids must change no result.
            updates.sort(key=lambda update: (update.tensors, update.num_examples))
            if self.cohort.hears_late:
                state = self.towards(round, state, updates, fleet)
            else:
                state = self.aggregate(state, updates)
        rows = ledger.take()
        evaluations: dict[int, Evaluation | None] = {}
        if evaluate:
            alike = self.alike(updates)
            for reply in fleet.measure(round, self.downlinks(round + 1, state, sorted(alike))):
                evaluations |= dict.fromkeys(alike[reply.client_id], reply.evaluation)
                rows += reply.rows
        return RoundOutcome(replies=replies, next_state=state, evaluations=evaluations, rows=tuple(rows))

    def usable(self, round: int, replies: Sequence[Reply], fleet: Visitor) -> list[AdapterUpdate]:
        """The valid updates; clients that sent an invalid one are left out of the round.

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
        """Decode and check a client's update.

        Args:
            reply: The client's reply, with the encoded `AdapterUpdate`.
            shapes: Shapes of an adapter, at any rank.

        Raises:
            MessageError: The message is not an update of this client and round, or its tensors are not finite or not
                those expected; it names the client.
        """
        expected = self.exchanged(shapes_at(shapes, self.ranks[reply.client_id]))
        who = {"client_id": reply.client_id, "round": reply.round}
        update = decode_uplink(AdapterUpdate, reply.uplink, **who, max_bytes=packed_bytes(expected))
        with naming(**who):
            check_shapes(unpack(update.tensors), expected)
        return update

    def exchanged(self, shapes: Shapes) -> Shapes:
        """Shapes of the tensors that are sent in both directions, for an adapter of these shapes: here all of it."""
        return shapes

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The server's next state: the means of A and of B over clients, weighted by private examples."""
        adapters = (unpack(update.tensors) for update in updates)
        return pack(weighted_mean(adapters, [update.num_examples for update in updates]), "float32")

    def towards(self, round: int, state: bytes, updates: Sequence[AdapterUpdate], fleet: Visitor) -> bytes:
        """The last average, moved towards that of updates of which some are late."""
        if not updates:
            return state
        ages = [round - update.round_number for update in updates]
        share = min(sum((1 + age) ** -0.5 for age in ages) / len(self.cohort.sample(round)), 1.0)
        before = unpack(state) if state else fleet.first_adapter
        after = unpack(self.aggregate(state, updates))
        return pack({key: (1 - share) * before[key].float() + share * after[key] for key in after}, "float32")

    def alike(self, updates: Sequence[AdapterUpdate]) -> Mapping[int, Sequence[int]]:
        """By a client whose model is measured after a round, the clients that have the same: here those of one rank, of
        all that take part in any round."""
        of_rank: dict[int, list[int]] = {}
        for client_id in self.cohort.members:
            of_rank.setdefault(self.ranks[client_id], []).append(client_id)
        return {clients[0]: clients for clients in of_rank.values()}

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The average as each client gets it, encoded once for each rank."""
        if not state:
            return dict.fromkeys(client_ids, b"")
        encoded: dict[int, bytes] = {}
        for rank in {self.ranks[client_id] for client_id in client_ids}:
            tensors = self.packed(self.share(unpack(state), rank))
            encoded[rank] = GlobalAdapter(round_number=round - 1, tensors=tensors).encode(self.compression)
        return {client_id: encoded[self.ranks[client_id]] for client_id in client_ids}

    def packed(self, tensors: Adapter) -> bytes:
        """Pack tensors that the server sends, in the type `dtype`.

        Raises:
            ConfigError: A value is too large for `dtype`.
        """
        try:
            return pack(tensors, self.dtype)
        except NotFiniteError as error:
            raise ConfigError(f"what the server sends: {error}") from error

    def received_rank(self, rank: int, missed: Sequence[Sequence[int]]) -> int:
        """Rank of what a client is sent: here its own.

        Args:
            rank: The client's rank.
            missed: For each round since the client's last, and that one, the ranks of those who took part.
        """
        return rank

    def share(self, average: Adapter, rank: int) -> Adapter:
        """The part of the average that a client of `rank` is sent: here all of it, since ranks are equal."""
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
        """The client's own answers to the public prompts, if it learns them; else none."""
        return own_labels(client, round, self.exchanges) if self.self_labels else NO_LABELS

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Set the client's adapter to the average; before there is one, to the adapter from which all clients start."""
        fresh = client.fresh_adapter()
        client.adapter = {**fresh, **self.sent(round, downlink, self.exchanged(shapes_of(fresh)))}

    def sent(self, round: int, downlink: bytes, expected: Shapes) -> Adapter:
        """The tensors of an encoded `GlobalAdapter`; an empty dict if the message is empty.

        Raises:
            MessageError: It is not such a message of an earlier round, or its tensors are not finite or not those
                expected.
        """
        if not downlink:
            return {}
        tensors = unpack(decode_downlink(GlobalAdapter, downlink, round=round).tensors)
        check_shapes(tensors, expected)
        return tensors

    def adjust(self, client: Client) -> Adjust | None:
        """What is done to gradients before each optimizer step: here nothing."""
        return None

    def trained(self, client: Client) -> Adapter:
        """The tensors that the client sends: here its whole adapter."""
        return client.adapter
