"""Forms the consensus: elects an answer to each prompt by a rule, many prompts at a time.

Legend: C answers to a prompt, each a ballot: one of each client, or several samples of each; P prompts, D embedding
dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from semcons_ray.consensus import rules
from semcons_ray.consensus.evidence import Competence, Defence, Evidence, equal, no_defence
from semcons_ray.consensus.tallies import nearness, present_vectors, shared_tallies, tallies
from semcons_ray.errors import ConfigError
from semcons_ray.parts import build

NORM_TOLERANCE = 1e-2
"""How far rounding to half precision may move the length of a unit vector from 1."""


@dataclass(frozen=True)
class Election:
    """How an answer is elected, and when a prompt gives no pseudo-label.

    Attributes:
        rule: A name of a rule, see `parts`; `consensus.rules` says what the built-in ones do.
        options: The rule's options.
        threshold: Least agreement, in [-1, 1], for a prompt to give a pseudo-label; None: no threshold.
        min_votes: Least number of clients that answered for a prompt to give a pseudo-label.
        competence: A name of a competence, see `parts`: how much each client's vote weighs.
        competence_options: Its options.
        defence: A name of a defence, see `parts`: whose votes are taken away.
        defence_options: Its options.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """

    rule: str = "medoid"
    options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    min_votes: int = 2
    competence: str = "equal"
    competence_options: Mapping[str, Any] = field(default_factory=dict)
    defence: str = "none"
    defence_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"algorithm.agreement_threshold must be in [-1, 1], not {self.threshold}")
        if self.min_votes < 1:
            raise ConfigError(f"algorithm.min_votes must be at least 1, not {self.min_votes}")
        self.scores()
        self.weighs()
        self.defends()

    def scores(self) -> rules.Rule:
        """The rule with its options."""
        rule: rules.Rule = build("rule", self.rule, self.options, setting="algorithm.rule_options")
        return rule

    def weighs(self) -> Competence:
        """The competence with its options."""
        setting = "algorithm.competence_options"
        competence: Competence = build("competence", self.competence, self.competence_options, setting=setting)
        return competence

    def defends(self) -> Defence:
        """The defence with its options."""
        setting = "algorithm.defence_options"
        defence: Defence = build("defence", self.defence, self.defence_options, setting=setting)
        return defence

    @property
    def needs_opinions(self) -> bool:
        """Whether the rule, or a weight, goes by which answers are the same text."""
        return not self.counts_all_alike or getattr(self.scores(), "needs_opinions", False)

    @property
    def counts_all_alike(self) -> bool:
        """Whether nothing is weighed, so that every client has one vote."""
        return self.weighs() is equal and self.defends() is no_defence


@dataclass(frozen=True)
class Facts:
    """What is known of the answers besides their vectors, on any device; None: it is not, or nothing needs it.

    Attributes:
        voters: The client of each answer as a number from 0, (C,) int64, a client's samples in their order: a client
            has one vote, in equal shares of those of its samples that are there. None: each is of a client of its own.
        draws: How many of its client's draws each answer stands for, (P, C): with several, it has as many of the equal
            shares. None: one each.
        num_draws: How many draws each answer's client made, (C,), of which those that are missing here count for
            nothing in `Evidence.shares`. None: as many as are here.
        weights: For weighted_medoid: weight of each answer's client, (C,), not negative.
        lengths: For longest and shortest: characters of each answer, (P, C).
        opinions: See `Evidence`, as the next five; rules `by_text` go by them, too. None: each answer is an opinion of
            its own.
        texts: For competence: which answers are equal, to whichever prompt. None: no two are.
        prompts: For competence and defences: vectors of the prompts.
        confidence: For competence: how sure clients say that they are.
        known: For competence and defences: answers that the server knows.
        trust: For defences: from the round before. None: everybody is trusted.
    """

    voters: Tensor | None = None
    draws: Tensor | None = None
    num_draws: Tensor | None = None
    weights: Tensor | None = None
    lengths: Tensor | None = None
    opinions: Tensor | None = None
    texts: Tensor | None = None
    prompts: Tensor | None = None
    confidence: Tensor | None = None
    known: Tensor | None = None
    trust: Tensor | None = None

    def on(self, device: torch.device) -> Facts:
        """The same on a device."""
        given = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return Facts(**{name: None if value is None else value.to(device) for name, value in given.items()})


NO_FACTS = Facts()


@dataclass(frozen=True)
class Consensus:
    """The elected answers, on the device of the embeddings.

    Attributes:
        winner: Index of the elected answer, (P,) int64; -1 where there is none.
        agreement: Similarity of the elected answer, whatever the rule, (P,) float32; NaN where fewer than two clients
            answered.
        similarity: Mean cosine of an answer to the other clients' answers to its prompt, (P, C) float32, in which each
            client has the same weight, evenly over its samples; NaN where it is missing or no other client answered.
        abstained: Whether a prompt gives no pseudo-label, (P,) bool: too few clients have a vote that counts, or there
            is a threshold and its agreement is below that or undefined.
        votes: What each answer's vote counts, (P, C) float32, of as many votes in all as there are clients: by default
            each client has one, in equal shares of those of its samples that are there.
        trust: How far each client is trusted from now on, (N,) float32, N being the number of clients.
    """

    winner: Tensor
    agreement: Tensor
    similarity: Tensor
    abstained: Tensor
    votes: Tensor
    trust: Tensor


@torch.no_grad()
def form_consensus(
    embeddings: Tensor,
    mask: Tensor,
    election: Election,
    priority: Tensor,
    facts: Facts = NO_FACTS,
    *,
    chunk_bytes: int | None = None,
) -> Consensus:
    """Elect one answer for each prompt.

    Scores within 1e-6 of each other are a tie, so that neither the order of arrival nor a device's rounding decides
    between equal answers; the one of highest `priority` wins. The threshold has the same tolerance.

    The embeddings are read once, or twice by rules that compare with a centre or in pairs, and never changed, so they
    may be memory-mapped and larger than memory. Working memory is a few times the size of `similarity`, plus a few
    times `chunk_bytes` or the C D float32 values of one prompt, whichever is more. Winners do not depend on
    `chunk_bytes`.

    Args:
        embeddings: Unit vectors of the answers, (P, C, D), floating point; computation is in float32. Rows of missing
            answers are ignored.
        mask: Which answers are there, (P, C) bool.
        election: The rule and its settings.
        priority: Decides ties, (P, C), all different; the highest wins. It is to be drawn at random, so that no client
            is favoured, and is all that decides for the rule random_client.
        facts: What else is known of the answers.
        chunk_bytes: Memory that a chunk of prompts may take. None: 1 GiB on a GPU; on a CPU 2 MiB for each thread,
            which stays in the cache, so that a chunk is read from memory once, however often a rule goes over it.

    Raises:
        ValueError: A tensor is missing, has the wrong shape or type, or an embedding is not a unit vector.
    """
    chunk_bytes = chunk_bytes or (2**21 * torch.get_num_threads() if embeddings.device.type == "cpu" else 2**30)
    score = election.scores()
    _check(embeddings, mask, election.rule, priority, facts)
    num_prompts, num_answers, dimension = embeddings.shape
    device = embeddings.device
    mask, priority, facts = mask.to(device), priority.to(device), facts.on(device)
    num_together = max(1, chunk_bytes // max(4 * num_answers * dimension, 1))
    chunks = [slice(start, start + num_together) for start in range(0, num_prompts, num_together)]

    counted = alike = _count_alike(embeddings, mask, facts, chunks)
    if not election.counts_all_alike:
        counted = _weigh(embeddings, alike, election, facts, chunks)

    winner = torch.full((num_prompts,), -1, device=device)
    needs_vectors = getattr(score, "needs_vectors", True)
    opinions = _opinions(mask, facts)

    def elect(here: slice | Tensor, eligible: Tensor) -> Tensor:
        ballots = rules.Ballots(
            vectors=present_vectors(embeddings[here], eligible) if needs_vectors else embeddings[:0],
            present=eligible,
            similarity=counted.similarity[here],
            shares=counted.votes[here].where(eligible, 0.0),
            voters=counted.voters,
            weights=None if facts.weights is None else facts.weights.float(),
            lengths=None if facts.lengths is None else facts.lengths[here],
            priority=priority[here],
            opinions=opinions[here],
            block_bytes=chunk_bytes,
        )
        scores = _checked(score(ballots), eligible, election.rule)
        return rules.elect(scores, priority[here]).where((scores > -torch.inf).any(dim=1), -1)

    for here in chunks if needs_vectors else [slice(None)] * (num_prompts > 0):
        winner[here] = elect(here, counted.present[here])
    if counted.max_wins is not None:
        _share_wins(winner, counted, elect, num_together)

    # The agreement of a client with itself is undefined; it was a number so far because rules need a score.
    similarity = alike.similarity.where(alike.num_clients > 1, torch.nan)
    agreement = similarity.gather(1, winner.clamp(min=0)[:, None]).squeeze(1).where(winner >= 0, torch.nan)
    abstained = (counted.num_clients[:, 0] < election.min_votes) | (winner < 0)
    if election.threshold is not None:
        abstained |= ~(agreement >= election.threshold - rules.TOLERANCE)
    return Consensus(winner, agreement, similarity, abstained, counted.votes, counted.trust)


@dataclass(frozen=True)
class _Counted:
    """Votes as they count, on the device of the embeddings.

    Attributes:
        votes: See `Consensus`.
        present: Which answers can be elected, (P, C) bool.
        voters: The client of each, (C,) int64.
        similarity: Mean cosine of an answer to the others', by what their votes count, (P, C); 1 where there are none,
            NaN where it cannot be elected.
        num_clients: How many clients have a vote, (P, 1) float32.
        norms: Length of each embedding, (P, C).
        trust: See `Consensus`.
        max_wins: See `evidence.Defence`; None: no limit.
    """

    votes: Tensor
    present: Tensor
    voters: Tensor
    similarity: Tensor
    num_clients: Tensor
    norms: Tensor
    trust: Tensor
    max_wins: float | None = None


def _count_alike(embeddings: Tensor, mask: Tensor, facts: Facts, chunks: Sequence[slice]) -> _Counted:
    """Every client has one vote."""
    device, num_answers = embeddings.device, embeddings.shape[1]
    voters = torch.arange(num_answers, device=device) if facts.voters is None else facts.voters
    shares = _shares(_draws(mask, facts), voters)
    if facts.voters is None:
        norms, to_all = tallies(embeddings, mask, chunks)
        to_own = norms.square()
    else:
        norms, to_all, to_own = shared_tallies(embeddings, mask, voters, shares, chunks)
    _check_norms(norms, mask)
    num_clients = shares.sum(dim=1, keepdim=True).round()
    similarity = ((to_all - to_own) / (num_clients - 1).clamp(min=1)).where(num_clients > 1, 1.0).where(mask, torch.nan)
    num_voters = int(voters.max()) + 1 if num_answers else 0
    trust = torch.ones(num_voters, device=device) if facts.trust is None else facts.trust
    return _Counted(shares, mask, voters, similarity, num_clients, norms, trust)


def _weigh(
    embeddings: Tensor, alike: _Counted, election: Election, facts: Facts, chunks: Sequence[slice]
) -> _Counted:
    """Votes as the defence leaves them and the competence weighs them."""
    mask, voters, shares = alike.present, alike.voters, alike.votes
    apart = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    evidence = Evidence(
        vectors=embeddings,
        present=mask,
        voters=voters,
        shares=shares if facts.num_draws is None else _draws(mask, facts) / facts.num_draws,
        opinions=_opinions(mask, facts).where(mask, -1),
        texts=(apart if facts.texts is None else facts.texts).where(mask, -1),
        similarity=alike.similarity,
        trust=alike.trust,
        prompts=facts.prompts,
        confidence=facts.confidence,
        known=facts.known,
        chunks=chunks,
    )
    defence = election.defends()
    ruling = defence(evidence)
    left = _weights(ruling.votes, mask, f"algorithm.defence {election.defence}")
    # Whoever has no vote is no witness of others' competence, either.
    weight = election.weighs()(evidence.without(left == 0))
    votes = shares * left * _weights(weight, mask, f"algorithm.competence {election.competence}")
    present = votes > 0
    counting = evidence.of_clients(votes).gt(0).sum(dim=1, keepdim=True)
    # Rules count votes: they stay as many as there are clients with a vote, whatever the scale of the weights.
    votes = votes * (counting / votes.sum(dim=1, keepdim=True).clamp(min=1e-30))
    num_clients = counting.float()
    if facts.voters is None:
        to_all, to_own = nearness(embeddings, mask, votes, chunks), votes * alike.norms.square()
    else:
        _, to_all, to_own = shared_tallies(embeddings, present, voters, votes, chunks)
    others = num_clients - evidence.of_clients(votes)[:, voters]
    similarity = ((to_all - to_own) / others.clamp(min=1e-30)).where(num_clients > 1, 1.0).where(present, torch.nan)
    max_wins = getattr(defence, "max_wins", None)
    return _Counted(votes, present, voters, similarity, num_clients, alike.norms, ruling.trust, max_wins)


def _opinions(mask: Tensor, facts: Facts) -> Tensor:
    """See `Evidence.opinions`, (P, C); a missing answer has one, too."""
    own = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return own if facts.opinions is None else facts.opinions


def _draws(mask: Tensor, facts: Facts) -> Tensor:
    """How many draws each answer stands for, (P, C) float32; 0 where it is missing."""
    return mask.float() if facts.draws is None else facts.draws.float().where(mask, 0.0)


def _share_wins(
    winner: Tensor, counted: _Counted, elect: Callable[[slice | Tensor, Tensor], Tensor], num_together: int
) -> None:
    """Take wins from clients that have more than their share, in place.

    A client keeps those where its answer is most similar to the others'. To the other prompts, without its answers, one
    of the others' is elected, unless there are none. If that gives somebody else too many, it goes on.

    Args:
        winner: Index of the elected answer, (P,); -1 where there is none.
        counted: The votes. A client may win a share `max_wins` of the prompts; an even share is always allowed.
        elect: The winners among some prompts' answers, given which prompts and which answers.
        num_together: For how many prompts at a time.
    """
    present, voters, max_wins = counted.present, counted.voters, counted.max_wins or 0.0
    num_prompts = len(winner)
    num_clients = int(voters[present.any(dim=0)].bincount().gt(0).sum())
    most = math.ceil(num_prompts * max(max_wins, 1 / max(num_clients, 1)) - 1e-9)
    left = present.clone()
    while True:
        client = voters[winner].where(winner >= 0, -1)
        lost = torch.zeros_like(winner, dtype=torch.bool)
        for over in (client[client >= 0].bincount() > most).nonzero().flatten().tolist():
            won = (client == over).nonzero().flatten()
            won = won[(left[won] & (voters != over)).any(dim=1)]
            clearest = counted.similarity[won, winner[won]].argsort(descending=True, stable=True)
            others = int((client == over).sum()) - len(won)
            lost[won[clearest[max(most - others, 0) :]]] = True
        if not bool(lost.any()):
            return
        left[lost] &= voters != client[lost][:, None]
        for part in torch.split(lost.nonzero().flatten(), num_together):
            winner[part] = elect(part, left[part])


def _checked(scores: Tensor, present: Tensor, rule: str) -> Tensor:
    """Scores of a rule, -inf where an answer is missing.

    Raises:
        ConfigError: They are no scores of these answers.
    """
    _check_given(scores, present, f"algorithm.rule {rule}", "scores")
    scores = scores.where(present, -torch.inf)
    if bool(scores.isnan().any()):
        raise ConfigError(f"algorithm.rule {rule} gives scores that are no numbers (NaN)")
    return scores


def _weights(weights: Tensor, present: Tensor, setting: str) -> Tensor:
    """Weights of votes as a part gives them, (P, C) float32, 0 where an answer is missing.

    Raises:
        ConfigError: They are no weights of these answers.
    """
    _check_given(weights, present, setting, "weights")
    weights = weights.float().where(present, 0.0)
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ConfigError(f"{setting} gives weights that are negative or not finite")
    return weights


def _check_given(values: Any, present: Tensor, part: str, wanted: str) -> None:
    """Check that a part, which may be anybody's, gives one number for each answer."""
    if not isinstance(values, Tensor) or values.shape != present.shape:
        found = _describe(values) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(f"{part} gives {found}, not {wanted} of shape {tuple(present.shape)}")


def _shares(draws: Tensor, voters: Tensor) -> Tensor:
    """Each answer's share of its client's vote, (P, C) float32, by the draws that it stands for; 0 where it is
    missing."""
    counts = torch.zeros_like(draws).index_add_(1, voters, draws)
    return draws / counts[:, voters].clamp(min=1)


def _check_norms(norms: Tensor, mask: Tensor) -> None:
    off = ~((norms - 1).abs() <= NORM_TOLERANCE) & mask  # NaN is off, too
    if bool(off.any()):
        prompt, answer = off.nonzero()[0].tolist()
        raise ValueError(
            f"embedding of prompt {prompt}, answer {answer} has length {float(norms[prompt, answer]):.3g}, not 1"
        )


def _check(
    embeddings: Tensor,
    mask: Tensor,
    rule: str,
    priority: Tensor,
    facts: Facts,
) -> None:
    voters, weights, lengths = facts.voters, facts.weights, facts.lengths
    if embeddings.ndim != 3 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be (P, C, D) and floating point, not {_describe(embeddings)}")
    if mask.shape != embeddings.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(embeddings.shape[:2])}, not {_describe(mask)}")
    if priority.shape != mask.shape:
        raise ValueError(f"priority must be of shape {tuple(mask.shape)}, not {_describe(priority)}")
    if voters is not None and (voters.shape != embeddings.shape[1:2] or voters.dtype != torch.int64):
        raise ValueError(f"voters must be int64 of shape ({embeddings.shape[1]},), not {_describe(voters)}")
    if voters is not None and not bool(((voters >= 0) & (voters < len(voters))).all()):
        raise ValueError("voters must be numbers from 0, and less than there are")
    if rule == "weighted_medoid":
        if weights is None or weights.shape != embeddings.shape[1:2]:
            raise ValueError(f"rule {rule} needs weights of shape ({embeddings.shape[1]},), not {_describe(weights)}")
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError("weights must be finite and not negative")
    if rule in ("longest", "shortest") and (lengths is None or lengths.shape != mask.shape):
        raise ValueError(f"rule {rule} needs lengths of shape {tuple(mask.shape)}, not {_describe(lengths)}")


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
