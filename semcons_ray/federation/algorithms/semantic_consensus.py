"""Federated fine-tuning by semantic consensus: answers cross the wire, never weights.

Source: A. Abourayya, J. Kleesiek, M. Kamp, "Beyond Parameter Aggregation: Semantic Consensus for Federated
Fine-Tuning of LLMs", arXiv:2605.11857. Its abstract gives the scheme:

    each client fine-tunes its own model on private data,
    and answers a shared set of public prompts; the answers are all that it sends;
    the server embeds the answers and forms a consensus per prompt,
    and returns the consensus as pseudo-labels for further local fine-tuning.

What the abstract leaves open, and what is chosen here:

    embedding     a sentence-embedding model on the server gives unit vectors
    consensus     one client's text is elected for each prompt, since an averaged vector cannot be decoded into text; by
                  default it is the medoid under cosine similarity (consensus/ has the other rules)
    abstention    a prompt whose agreement is below a threshold gives no pseudo-label (FedCT, arXiv:2310.05696); nor
                  does one that fewer than `algorithm.min_votes` clients answered
    pseudo-labels they are added to the private data, each example with the same weight, as in FedCT
    answers       they are sampled at temperature 1, not greedy: many samples carry how sure a client is, so whoever
                  learns them learns the mixture of the clients' distributions; greedy answers teach overconfidence. A
                  client may draw several to each prompt (`generation.num_samples`), which share its one vote evenly,
                  or of which it sends its choice alone (`generation.send_draws`)
    votes         by default those of all clients count alike, one draw each, and nobody is distrusted: no way of
                  electing wins everywhere. On open questions none gave better models than a random client's answers
                  (experiments/quality), so the default is the cheapest. Where questions have one short answer, the most
                  common text of eight draws, votes weighed by competence `expertise`, makes labels right 2.5 times as
                  often (experiments/skills; `semcons init --preset short-answers`). Defence `independent` stops most
                  colluders, and takes a few clients that know much more than the others for some (experiments/attack)
    averaging     a client continues with the mean of its adapter before and after a round (`algorithm.ema_decay`). This
                  removes noise from its steps, as averaging over clients does in FedAvg, and costs no communication
    order         a client trains and answers in one visit, with no barrier between the two, so the pseudo-labels of a
                  round are learnt in the next. Before the first exchange (`algorithm.first_exchange`) training is
                  local, and in the last round nobody answers, since nobody would learn from it
    ties          they are decided by a permutation of the clients drawn for each prompt and round, so that results
                  depend neither on who answers first nor on clients' ids
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semcons_ray.federation.algorithms.local_only import own_labels, train_apart
from semcons_ray.federation.fleet import RoundOutcome, Visitor, own_evaluations
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerProtocol, ServerState
from semcons_ray.messages import NO_LABELS, PseudoLabels, decode_downlink

if TYPE_CHECKING:  # the driver and the server run algorithms without loading transformers
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class SemanticConsensus:
    """Semantic consensus; the methods are in the order in which a round calls them.

    Attributes:
        cohort: Who takes part in a round.
        label_weight: Weight of a pseudo-label in the loss, where a private example has 1.
        compression: Compression of messages: "none" or "zstd".
        exchanges: Rounds in which clients answer.
        ema_decay: Weight of a client's old adapter in its moving average; see `Client.fine_tune`.
        self_training: Whether each client learns its own answers and nothing is exchanged (rule `own_answer`): the
            control that shows what the exchange itself is worth.
    """

    cohort: Cohort
    label_weight: float = 1.0
    compression: str = "none"
    exchanges: range = range(1, 2)
    ema_decay: float = 0.0
    self_training: bool = False

    uses_public_prompts: ClassVar[bool] = True
    any_models: ClassVar[bool] = True
    any_ranks: ClassVar[bool] = True
    forms_consensus: ClassVar[bool] = True
    can_hear_late: ClassVar[bool] = True

    def first_state(self) -> bytes:
        """A `ServerState` with no labels."""
        return ServerState(NO_LABELS.encode(self.compression)).encode()

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The pseudo-labels, the same for all clients; an empty message in self-training."""
        labels = ServerState.decode(state).labels
        return dict.fromkeys(client_ids, b"" if self.self_training else labels)

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """The server's part: send the last pseudo-labels out, collect answers, form the next pseudo-labels.

        Args:
            round: The round, from 1.
            state: The `ServerState` of the round before.
            fleet: Visits clients.
            server: Embeds answers while other clients are still at work, and forms the consensus.
            evaluate: Whether clients are measured on the test set after their visit.

        Raises:
            QuorumError: Too few clients answered.
        """
        participants = self.cohort.sample(round)
        downlinks = self.downlinks(round, state, participants)
        if round not in self.exchanges or self.self_training:
            return train_apart(round, state, downlinks, fleet, evaluate=evaluate)
        server.begin(round, self.cohort.awaited(round), ServerState.decode(state).kept)
        replies = []
        for reply in fleet.visit(round, downlinks, evaluate=evaluate):
            if reply.round in self.exchanges:  # one that comes late may be of a round before the first exchange
                server.collect(reply.client_id, reply.uplink, reply.round)
            replies.append(reply)
        verdict = server.conclude()
        if verdict.refused:
            fleet.leave_out(round, verdict.refused)
        return RoundOutcome(
            replies=tuple(sorted(replies, key=lambda reply: reply.client_id)),
            next_state=ServerState(verdict.labels.encode(self.compression), verdict.kept).encode(),
            evaluations=own_evaluations([reply for reply in replies if reply.client_id not in verdict.refused]),
            verdict=verdict,
        )

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """The client's part: train on private data and the last pseudo-labels, then answer the public prompts.

        Before the first exchange there are no pseudo-labels and no answers.
        """
        labels = (
            own_labels(client, round, self.exchanges)
            if self.self_training
            else decode_downlink(PseudoLabels, downlink, round=round)
        )
        client.fine_tune(
            round,
            labels,
            weight=self.label_weight,
            ema_decay=self.ema_decay,
            downlink_bytes=len(downlink),
        )
        if round not in self.exchanges or self.self_training:
            return b""
        return client.answer(round, self.compression)

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Nothing to do: a client's model is its own."""
