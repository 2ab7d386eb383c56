"""The server: embeds answers as they arrive, forms a consensus per prompt, and hands out pseudo-labels.

Legend: C clients whose answers were awaited; B ballots, the answers to a prompt that were awaited: one of each client,
or as many samples as it draws; P public prompts; D embedding dimension.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semcons_ray.config import ByClient, GenerationConfig
from semcons_ray.consensus import NORM_TOLERANCE, Election, Facts, form_consensus
from semcons_ray.consensus.evidence import UNKNOWN
from semcons_ray.errors import MessageError, ModelError, SemconsError, first_line
from semcons_ray.federation.opinions import opinions_of
from semcons_ray.federation.randomness import priorities
from semcons_ray.federation.server_state import read_state
from semcons_ray.messages import Answers, PseudoLabels, decode_uplink, naming
from semcons_ray.metering.gpus import this_place
from semcons_ray.metering.ledger import Ledger, LedgerRow
from semcons_ray.parts import build


@dataclass(frozen=True)
class Verdict:
    """The consensus of a round, with all that led to it.

    Attributes:
        client_ids: The client of each ballot, ascending, shape (B,).
        samples: Which of its client's samples each is, from 0, (B,).
        answers: The answers, shape (B, P); an empty text where one is missing.
        draws: How many of its client's draws each answer stands for, (B, P): 1, unless it is the client's choice.
        confidence: How likely its client's model finds each answer, (B, P): see `Answers`; NaN where it does not say.
        similarity: Mean cosine of an answer to the others of its prompt, (P, B); see `Consensus.similarity`.
        winner: Id of the client whose answer was elected, (P,); -1 where none was.
        winning_sample: Which of that client's samples it was, (P,); -1 where none was.
        agreement: Similarity of the elected answer, (P,); NaN where fewer than two clients answered.
        abstained: Whether a prompt gave no pseudo-label, (P,).
        labels: The pseudo-labels, as they are sent to clients.
        votes: What each answer's vote counted, (P, B); see `Consensus.votes`.
        distrusted: Ids of the clients that the defence trusts less than fully, ascending.
        kept: What the server keeps for the next round, to be given to `begin`.
        rows: Ledger rows of the server's work.
        refused: Clients whose message was invalid and so has no vote, each with the reason.
    """

    client_ids: tuple[int, ...]
    samples: tuple[int, ...]
    answers: tuple[tuple[str, ...], ...]
    draws: tuple[tuple[int, ...], ...]
    confidence: tuple[tuple[float, ...], ...]
    similarity: npt.NDArray[np.float32]
    winner: npt.NDArray[np.int64]
    winning_sample: npt.NDArray[np.int64]
    agreement: npt.NDArray[np.float32]
    abstained: npt.NDArray[np.bool_]
    labels: PseudoLabels
    votes: npt.NDArray[np.float32]
    distrusted: tuple[int, ...]
    kept: bytes
    rows: tuple[LedgerRow, ...]
    refused: Mapping[int, str]


class ServerState(msgspec.Struct, frozen=True):
    """What is kept of the server from round to round.

    Attributes:
        labels: The encoded `PseudoLabels` of the last exchange.
        kept: See `Verdict`; empty before the first exchange.
    """

    labels: bytes
    kept: bytes = b""

    def encode(self) -> bytes:
        """The state as bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, state: bytes) -> Self:
        """The state in these bytes; see `read_state`."""
        return read_state(state, cls)


class ServerProtocol(Protocol):
    """The server as algorithms and experiments see it, wherever it runs."""

    def begin(self, round: int, client_ids: Sequence[int], kept: bytes = b"") -> None:
        """Begin a round in which the answers of these clients are awaited; `kept` is what the last verdict said to
        keep."""
        ...

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None = None) -> None:
        """Take the encoded `Answers` of a client. If the message is invalid, the client has no vote
        (`Verdict.refused`).

        Args:
            client_id: The client.
            uplink: Its message.
            asked_in: The round in which it was asked, and of which its message must be; None: this one.
        """
        ...

    def conclude(self) -> Verdict:
        """Form the consensus of the answers collected since `begin`."""
        ...

    def similarity(self, round: int, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Cosine of each prediction to its reference, in [-1, 1], for evaluation; 0 for an empty prediction."""
        ...

    def take_rows(self) -> list[LedgerRow]:
        """Ledger rows of work since the last call that is in no verdict: loading and evaluation."""
        ...

    def close(self) -> None:
        """Free what the server holds."""
        ...


class TextEmbedder(Protocol):
    """Turns texts into unit vectors; equal texts give equal vectors, whatever they are embedded with.

    Parameters of its class are its options, but for `device`, "cpu" or "cuda".
    """

    @property
    def dimension(self) -> int:
        """Length D of a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of N texts, (N, D) float32."""
        ...


NOTHING_KNOWN: Mapping[int, str] = {}

IN_MEMORY = 2 << 30
"""Most bytes of embeddings that the server holds in memory."""


class Server:
    """The server's part of the protocol, in this process.

    During a round it holds the embeddings of all ballots, P B D float32 values: with n samples of each client n times
    as many as with one. On a CPU they are in a file of the system's folder for such (TMPDIR) if they are large.

    Args:
        embedder: Turns texts into unit vectors.
        num_prompts: Number P of public prompts.
        election: Consensus rule and its settings.
        generation: How each client answers, by client id; None: as by default, with one answer.
        prompts: The public prompts as texts, (P,), for defences, and to be embedded together with their answers; empty:
            there is no need of them.
        embeds_both: Whether answers are embedded together with their prompts.
        known: Answers that it knows, by prompt, which become the pseudo-labels instead of elected ones: else it would
            hand out answers of which it knows that they are wrong, or tell by leaving them out which ones it knows. For
            the rule `reference` all, an upper bound.
        seed: The experiment's seed.
        ledger: Where its work is recorded.
    """

    def __init__(
        self,
        embedder: TextEmbedder,
        *,
        num_prompts: int,
        election: Election,
        generation: ByClient[GenerationConfig] | None = None,
        prompts: Sequence[str] = (),
        embeds_both: bool = False,
        known: Mapping[int, str] = NOTHING_KNOWN,
        seed: int,
        ledger: Ledger,
    ) -> None:
        self._embedder = embedder
        self._num_prompts = num_prompts
        self._election = election
        self._generation = generation
        self._prompts = prompts
        self._embeds_both = embeds_both
        self._known = known
        self._seed = seed
        self._ledger = ledger

    def begin(self, round: int, client_ids: Sequence[int], kept: bytes = b"") -> None:
        """See `ServerProtocol.begin`."""
        self._round = round
        self._trust: dict[int, float] = read_state(kept, dict[int, float]) if kept else {}
        # Columns are in an order drawn for the round, not in that of client ids: the rounding of sums over clients
        # depends on their order, and a client's id must change no result.
        draws = priorities(self._seed, round, client_ids, self._num_prompts)
        order = np.lexsort((client_ids, draws[0])).tolist()
        ordered = [client_ids[place] for place in order]
        alike = GenerationConfig()
        self._asked = {client: self._generation[client] if self._generation else alike for client in ordered}
        num_ballots = [own.num_sent for own in self._asked.values()]
        self._ballots = [(client, sample) for client, own in self._asked.items() for sample in range(own.num_sent)]
        self._column = {client: column for column, (client, sample) in enumerate(self._ballots) if sample == 0}
        # Among equals a client is drawn, so that more samples are no more chances, and then its first sample wins.
        ranks = draws[:, order].argsort(axis=1).argsort(axis=1).repeat(num_ballots, axis=1)
        most = max(num_ballots, default=1)
        self._priority = torch.from_numpy(ranks - np.array([sample / most for _, sample in self._ballots]))
        self._answers: dict[int, Answers] = {}
        self._refused: dict[int, str] = {}
        self._embeddings: Tensor | None = None

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None = None) -> None:
        """See `ServerProtocol.collect`. A message that comes twice, after a restart, counts once."""
        with self._ledger.stage("embed", round=self._round) as work:
            if client_id in self._answers:
                return
            try:
                message = self._decoded(client_id, uplink, self._round if asked_in is None else asked_in)
            except MessageError as error:
                self._refused[client_id] = str(error)
                return
            texts = [text for sample in message.samples for text in self._embedded(sample)]
            vectors = self._embedder.embed(texts)
            if self._embeddings is None:
                self._embeddings = self._room(vectors)
            by_sample = vectors.reshape(len(message.samples), self._num_prompts, -1)
            column = self._column[client_id]
            self._embeddings[:, column : column + len(message.samples)] = by_sample.transpose(0, 1)
            self._answers[client_id] = message
            self._refused.pop(client_id, None)
            work.tokens = sum(len(answer.split()) for sample in message.samples for answer in sample)

    def _room(self, vectors: Tensor) -> Tensor:
        """Zeros for the embeddings of all ballots, (P, B, D), like vectors: in memory or, on a CPU and beyond
        `IN_MEMORY`, in a file, of which the system keeps in memory what there is room for."""
        num_ballots, num_prompts, dimension = len(self._ballots), self._num_prompts, self._embedder.dimension
        count = num_ballots * num_prompts * dimension
        if vectors.device.type != "cpu" or count * vectors.element_size() <= IN_MEMORY:
            return vectors.new_zeros(num_prompts, num_ballots, dimension)
        with tempfile.NamedTemporaryFile(prefix="semcons-embeddings-") as file:  # gone with the last mapping of it
            mapped = torch.from_file(file.name, shared=True, size=count, dtype=vectors.dtype)
        return mapped.view(num_ballots, num_prompts, dimension).transpose(0, 1)  # a client's in a row

    def _decoded(self, client_id: int, uplink: bytes, round: int) -> Answers:
        message = decode_uplink(Answers, uplink, client_id=client_id, round=round)
        with naming(client_id, round):
            if client_id not in self._asked:
                raise MessageError("Answers: from a client that was not asked")
            if len(message.answers) != self._num_prompts:
                raise MessageError(f"Answers: {len(message.answers)} answers to {self._num_prompts} prompts")
            found, asked = len(message.samples), self._asked[client_id]
            if found != asked.num_sent:
                raise MessageError(f"Answers: {found} samples of each answer, not {asked.num_sent}")
            if bool(message.counts) != (asked.send_draws == "choice"):
                raise MessageError("Answers: counts of draws that were not asked for, or none that were")
            if (most := max(message.counts, default=0)) > asked.num_samples:
                raise MessageError(f"Answers: counts {most} draws of {asked.num_samples}")
            if message.confidence and not asked.send_confidence:
                raise MessageError("Answers: confidence that was not asked for")
        return message

    def _embedded(self, answers: Sequence[str]) -> Sequence[str]:
        if not self._embeds_both:
            return answers
        return [f"{prompt}\n{answer}" for prompt, answer in zip(self._prompts, answers, strict=True)]

    def conclude(self) -> Verdict:
        """See `ServerProtocol.conclude`."""
        with self._ledger.stage("consensus", round=self._round):
            client_ids = [client for client, _ in self._ballots]
            sent = self._answers
            ballots = [self._ballot(client, sample) for client, sample in self._ballots]
            answers, draws, confidence = zip(*ballots, strict=True) if ballots else ((), (), ())
            weights = [float(sent[c].num_examples) if c in sent else 0.0 for c in client_ids]
            numbers = {client: number for number, client in enumerate(self._asked)}
            has_several = len(self._ballots) > len(numbers)
            lengths = torch.tensor([[len(answer) for answer in row] for row in answers]).T
            embeddings = self._embeddings
            if embeddings is None:
                embeddings = torch.zeros(self._num_prompts, len(client_ids), self._embedder.dimension)
            weighs = not self._election.counts_all_alike
            says_confidence = any(own.send_confidence for own in self._asked.values())
            opinions, right = self._opinions(answers) if self._election.needs_opinions else (None, None)
            facts = Facts(
                voters=torch.tensor([numbers[c] for c in client_ids]) if has_several else None,
                draws=torch.tensor(draws).T,
                num_draws=torch.tensor([self._asked[c].num_samples for c in client_ids]),
                weights=torch.tensor(weights),
                lengths=lengths,
                opinions=opinions,
                known=right,
                confidence=torch.tensor(confidence).T if says_confidence else None,
                texts=opinions_of([(text,) for row in answers for text in row]).view(len(answers), -1).T
                if weighs
                else None,
                prompts=self._embedder.embed(self._prompts) if weighs and self._prompts else None,
                trust=torch.tensor([self._trust.get(client, 1.0) for client in numbers]),
            )
            consensus = form_consensus(embeddings, lengths > 0, self._election, self._priority, facts)
            trust = dict(zip(numbers, consensus.trust.tolist(), strict=True))
            self._trust |= trust
            winner, abstained = consensus.winner.cpu().numpy(), consensus.abstained.cpu().numpy()
            elected = {prompt: answers[column][prompt] for prompt, column in enumerate(winner) if column >= 0}
            winner[[*self._known]], abstained[[*self._known]] = -1, False
            elected |= self._known
            every = range(self._num_prompts)
            labels = PseudoLabels.of(self._round, [None if abstained[prompt] else elected[prompt] for prompt in every])
        self._embeddings = None
        ascending = sorted(range(len(client_ids)), key=self._ballots.__getitem__)
        of_winner = np.array([*self._ballots, (-1, -1)])[winner]
        return Verdict(
            client_ids=tuple(client_ids[column] for column in ascending),
            samples=tuple(self._ballots[column][1] for column in ascending),
            answers=tuple(answers[column] for column in ascending),
            draws=tuple(draws[column] for column in ascending),
            confidence=tuple(confidence[column] for column in ascending),
            similarity=consensus.similarity.cpu().numpy()[:, ascending],
            winner=of_winner[:, 0],
            winning_sample=of_winner[:, 1],
            agreement=consensus.agreement.cpu().numpy(),
            abstained=abstained,
            labels=labels,
            votes=consensus.votes.cpu().numpy()[:, ascending],
            distrusted=tuple(sorted(client for client, share in trust.items() if share < 1)),
            kept=msgspec.msgpack.encode(self._trust) if weighs else b"",
            rows=tuple(self._ledger.take()),
            refused=self._refused,
        )

    def _opinions(self, answers: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor | None]:
        """See `Evidence.opinions` and `Evidence.known`."""
        if not self._known:
            return opinions_of(answers), None
        # Right answers are compared as if they were a last ballot.
        opinions = opinions_of([*answers, [self._known.get(prompt, "") for prompt in range(self._num_prompts)]])
        right = opinions[:, -1].where(opinions[:, -1] < len(answers), -1)
        right[[prompt for prompt in range(self._num_prompts) if prompt not in self._known]] = UNKNOWN
        return opinions[:, :-1], right

    def _ballot(self, client: int, sample: int) -> tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]:
        """The texts of a ballot, (P,), how many draws each of them stands for, and the client's confidence in it; all
        empty if its client is missing."""
        every = self._num_prompts
        if client not in self._answers:
            return ("",) * every, (0,) * every, (math.nan,) * every
        message = self._answers[client]
        return message.samples[sample], message.counts or (1,) * every, message.confidences[sample]

    def similarity(self, round: int, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """See `ServerProtocol.similarity`."""
        with self._ledger.stage("evaluate", round=round):
            cosines = (self._embedder.embed(predictions) * self._embedder.embed(references)).sum(dim=1).tolist()
        return [cosine if text else 0.0 for cosine, text in zip(cosines, predictions, strict=True)]

    def take_rows(self) -> list[LedgerRow]:
        """See `ServerProtocol.take_rows`."""
        return self._ledger.take()

    def close(self) -> None:
        """Nothing to free."""


class ServerOnDemand:
    """A server that is made when it is first needed; where nothing is to be embedded, that is never.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], ServerProtocol]) -> None:
        self._make = make
        self._made: ServerProtocol | None = None

    def begin(self, round: int, client_ids: Sequence[int], kept: bytes = b"") -> None:
        """See `ServerProtocol.begin`."""
        self._needed().begin(round, client_ids, kept)

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None = None) -> None:
        """See `ServerProtocol.collect`."""
        self._needed().collect(client_id, uplink, asked_in)

    def conclude(self) -> Verdict:
        """See `ServerProtocol.conclude`."""
        return self._needed().conclude()

    def similarity(self, round: int, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """See `ServerProtocol.similarity`."""
        return self._needed().similarity(round, predictions, references)

    def take_rows(self) -> list[LedgerRow]:
        """See `ServerProtocol.take_rows`."""
        return self._made.take_rows() if self._made else []

    def close(self) -> None:
        """See `ServerProtocol.close`."""
        if self._made:
            self._made.close()

    def _needed(self) -> ServerProtocol:
        if self._made is None:
            self._made = self._make()
        return self._made


SAMPLES = ("sample", "A sample, of 2 sentences. The other.")
"""Texts on which an embedder is tried when it is loaded."""


def build_embedder(name: str, options: Mapping[str, Any], device: str) -> TextEmbedder:
    """Load an embedder, see `parts`.

    Raises:
        ModelError: It cannot be loaded, or gives no unit vectors.
        ConfigError: It refuses its options.
    """
    setting = "server.embedder_options"
    embedder: TextEmbedder = build("embedder", name, options, setting=setting, offered={"device": device})
    try:
        tried = embedder.embed(SAMPLES)
        norms = tried.float().norm(dim=1)
        shape, wanted = tuple(tried.shape), (len(SAMPLES), embedder.dimension)
    except SemconsError:
        raise
    except Exception as error:  # anybody's object may raise anything
        raise ModelError(f"server.embedder {name} cannot embed: {type(error).__name__}: {first_line(error)}") from error
    if shape != wanted:
        raise ModelError(f"server.embedder {name} gives vectors of shape {shape} for 2 texts, not {wanted}")
    if not bool(((norms - 1).abs() < NORM_TOLERANCE).all()):
        raise ModelError(f"server.embedder {name} gives vectors of lengths {norms.tolist()}, not 1")
    return embedder


@dataclass(frozen=True)
class ServerSpec:
    """Everything a process needs to build its server; see `Server` and `build_embedder` for what the fields are.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads.
    """

    embedder: str
    embedder_options: Mapping[str, Any]
    device: str
    threads: int
    num_prompts: int
    election: Election
    prompts: tuple[str, ...]
    known: Mapping[int, str]
    seed: int
    generation: ByClient[GenerationConfig] | None = None
    embeds_both: bool = False

    def build(self) -> Server:
        """Load the embedder and make the server.

        Raises:
            ModelError: The embedder cannot be found or loaded.
        """
        torch.set_num_threads(self.threads)
        place = this_place(uses_gpu=self.device == "cuda")
        ledger = Ledger("server", place.node, place.gpus)
        with ledger.stage("load", round=0):
            embedder = build_embedder(self.embedder, self.embedder_options, self.device)
        return Server(
            embedder,
            num_prompts=self.num_prompts,
            election=self.election,
            generation=self.generation,
            prompts=self.prompts,
            embeds_both=self.embeds_both,
            known=self.known,
            seed=self.seed,
            ledger=ledger,
        )
