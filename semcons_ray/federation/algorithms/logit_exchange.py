"""Exchange of token probabilities, as in FedMD: the baseline that sends what a model holds likely, not what it says.

Sources: D. Li, J. Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", arXiv:1910.03581: clients
send class scores of a public data set, the server averages them with equal weights, and each client learns the average
("digest") and then its private data ("revisit"). T. Fan et al., "FedMKT: Federated Mutual Knowledge Transfer for Large
and Small Language Models", arXiv:2406.02224, and its code in FATE-LLM: for language models, with the K largest logits
at each token of public texts, which are learnt by cross-entropy with soft targets.

What is FedMD's: equal weights; the average as target; private and public data. What is FedMKT's: K tokens a place, the
loss. What differs here:

    answers       both have public data with answers, at whose tokens everybody is scored. Here public prompts have
                  none, as in semantic consensus. So each client scores its own greedy answer, whose tokens it sends as
                  well; the server averages, at each token, over the clients whose own answer begins with the same
                  tokens up to there, at the first over all, and goes on with the likeliest token by which one of them
                  does. Targets are ready in the next round, as pseudo-labels are
    probabilities clients send probabilities, not logits; the mean's K largest are made to add up to 1
    selection     FedMKT learns only from those whose loss on the answer is lower, which needs the right answer
    server        FedMKT has a large model at the server, which learns and teaches; here there is none
    tokenizers    FedMKT aligns the tokens of different ones; here all clients have one model, with ranks of their own
    steps         targets are learnt in the same steps as private data, as pseudo-labels are, not before them
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from semcons_ray.errors import MessageError
from semcons_ray.federation.algorithms.local_only import train_apart
from semcons_ray.federation.fleet import Reply, RoundOutcome, Visitor, own_evaluations
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerProtocol
from semcons_ray.federation.token_probabilities import TokenProbabilities, averaged
from semcons_ray.messages import NO_TARGETS, TokenScores, TokenTargets, decode_downlink, decode_uplink, naming
from semcons_ray.metering.ledger import Ledger

if TYPE_CHECKING:  # the driver runs algorithms without loading transformers
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class LogitExchange:
    """Exchange of token probabilities; the methods are in the order in which a round calls them.

    Attributes:
        cohort: Who takes part in a round.
        label_weight: Weight of a target's token in the loss, where one of a private example has 1.
        compression: Compression of messages: "none" or "zstd".
        exchanges: Rounds in which clients send token probabilities.
        ema_decay: Weight of a client's old adapter in its moving average; see `Client.fine_tune`.
        top_k: How many tokens of each place are sent.
    """

    cohort: Cohort
    label_weight: float = 1.0
    compression: str = "none"
    exchanges: range = range(1, 2)
    ema_decay: float = 0.0
    top_k: Annotated[int, Field(ge=1, le=1000)] = 10

    uses_public_prompts: ClassVar[bool] = True
    any_ranks: ClassVar[bool] = True
    exchanges_tokens: ClassVar[bool] = True

    def first_state(self) -> bytes:
        """An encoded `TokenTargets` without any."""
        return NO_TARGETS.encode(self.compression)

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The targets, the same for all clients."""
        return dict.fromkeys(client_ids, state)

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """Send the last targets out, collect token probabilities, average them; see `Algorithm.run_round`."""
        downlinks = self.downlinks(round, state, self.cohort.sample(round))
        if round not in self.exchanges:
            return train_apart(round, state, downlinks, fleet, evaluate=evaluate)
        replies = tuple(sorted(fleet.visit(round, downlinks, evaluate=evaluate), key=lambda reply: reply.client_id))
        ledger = Ledger("driver", socket.gethostname())
        with ledger.stage("aggregate", round=round):
            given = self.usable(round, replies, fleet)
            targets = self.targets(round, given)
        usable = [reply for reply in replies if reply.client_id in given]
        return RoundOutcome(
            replies=replies,
            next_state=targets.encode(self.compression),
            evaluations=own_evaluations(usable),
            rows=tuple(ledger.take()),
        )

    def usable(self, round: int, replies: Sequence[Reply], fleet: Visitor) -> dict[int, TokenProbabilities]:
        """The valid scores by client; clients that sent invalid ones, or of another number of prompts than most, are
        left out of the round.

        Raises:
            QuorumError: Too few are left.
        """
        given, refused = dict[int, TokenProbabilities](), dict[int, str]()
        for reply in replies:
            try:
                given[reply.client_id] = self.received(reply)
            except MessageError as error:
                refused[reply.client_id] = str(error)
        numbers = Counter(len(scores.answers) for scores in given.values())
        asked = max(numbers, key=lambda number: (numbers[number], number), default=0)
        for client_id in [client_id for client_id, scores in given.items() if len(scores.answers) != asked]:
            found = len(given.pop(client_id).answers)
            refused[client_id] = f"client {client_id}, round {round}: TokenScores: {found} answers to {asked} prompts"
        if refused:
            fleet.leave_out(round, refused)
        return given

    def received(self, reply: Reply) -> TokenProbabilities:
        """Decode and check what a client sent.

        Raises:
            MessageError: The message is not of this client and round, or holds no such scores; it names the client.
        """
        who = {"client_id": reply.client_id, "round": reply.round}
        message = decode_uplink(TokenScores, reply.uplink, **who)
        with naming(**who):
            return TokenProbabilities.unpacked(message.answers, message.tokens, message.probabilities, self.top_k)

    def targets(self, round: int, given: Mapping[int, TokenProbabilities]) -> TokenTargets:
        """The answers on which clients agree, and the mean probabilities at each of their tokens."""
        means = averaged([*given.values()], self.top_k)
        tokens, probabilities = means.packed()
        return TokenTargets(round_number=round, answers=means.answers, tokens=tokens, probabilities=probabilities)

    def visit(self, client: Client, round: int, downlink: bytes) -> bytes:
        """The client's part: train on private data and the last targets, then answer and score its answers."""
        message = decode_downlink(TokenTargets, downlink, round=round)
        targets = TokenProbabilities.unpacked(message.answers, message.tokens, message.probabilities, self.top_k)
        client.distil(
            round, targets, weight=self.label_weight, ema_decay=self.ema_decay, downlink_bytes=len(downlink)
        )
        return client.token_scores(round, self.top_k, self.compression) if round in self.exchanges else b""

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Nothing to do: a client's model is its own."""
