"""The consensus rules: each scores the answers to a prompt, and the answer with the highest score is elected.

Legend: p prompts at once; C answers, each a ballot, of which n are there for a prompt; D embedding dimension; e_i the
unit vector of answer i, zero where it is missing. By default each ballot is of a client of its own. Where clients have
several (samples), each client has one vote, which is shared evenly among those of its ballots that are there: wherever
answers are counted or averaged below, they are by these shares; the others of an answer are other clients', since a
client with many samples could vouch for itself by them.

For unit vectors the answer nearest to a point z is the one with the greatest e_i . z. So the medoid and its relatives
differ only in their centre z, cost O(C D) a prompt, and need no C x C matrix. Plurality and multi-Krum do compare all
pairs, O(C^2 D), a block of rows at a time. They do it in float64, so that whether two answers are the same opinion does
not depend on rounding, which differs from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

# Scores and cosines closer than this are equal. Float32 noise is a tenth of it; different answers differ by more.
TOLERANCE = 1e-6

WEISZFELD_STEPS = 32
WEISZFELD_SMOOTHING = 1e-3


@dataclass(frozen=True)
class Ballots:
    """The answers to p prompts.

    Attributes:
        vectors: Unit vectors, zero where an answer is missing, (p, C, D) float32. A rule `without_vectors` gets none.
        present: Which answers are there, (p, C) bool.
        similarity: Mean cosine of an answer to the other clients' answers, (p, C); 1 where there are none, NaN where
            it is missing.
        shares: Each ballot's share of its client's vote, (p, C) float32; 0 where it is missing.
        voters: The client of each, as a number from 0, (C,); a client's samples are in their order.
        weights: Weight of each one's client, (C,), not negative; for `weighted_medoid`.
        lengths: Length of each answer in characters, (p, C); for `longest` and `shortest`.
        priority: Decides ties, (p, C), all different; the highest wins.
        opinions: Which answers to a prompt are the same text, (p, C): see `consensus.evidence.Evidence`. Only for rules
            `by_text`; for others, and where an answer is missing, it may hold anything.
        block_bytes: Memory that a rule may take for rows of a matrix of all pairs.
    """

    vectors: Tensor
    present: Tensor
    similarity: Tensor
    shares: Tensor
    voters: Tensor
    weights: Tensor | None
    lengths: Tensor | None
    priority: Tensor
    opinions: Tensor
    block_bytes: int = 2**21

    def nearness(self, shares: Tensor) -> Tensor:
        """Scores e_i . z, (p, C), for the centre z = sum of shares_j e_j, where `shares` is (p, C)."""
        return products(torch.bmm(shares[:, None, :], self.vectors), self.vectors)


class Rule(Protocol):
    """How answers are scored: a function, or a class whose objects can be called as one.

    Parameters of the class, or of the function besides `ballots`, are its options. If it goes by nothing that needs
    `Ballots.vectors`, it may say so by an attribute `needs_vectors = False`, and saves the server work. If it needs
    `Ballots.opinions`, it must say so by `needs_opinions = True`.
    """

    def __call__(self, ballots: Ballots) -> Tensor:
        """Scores, (p, C), -inf where an answer cannot be elected; scores of missing answers are ignored."""
        ...


RuleFunction = TypeVar("RuleFunction", bound=Callable[[Ballots], Tensor])


def without_vectors(rule: RuleFunction) -> RuleFunction:
    """Say of a rule that it needs no vectors: it goes by similarity, lengths or chance."""
    rule.needs_vectors = False  # type: ignore[attr-defined]
    return rule


def by_text(rule: RuleFunction) -> RuleFunction:
    """Say of a rule that it goes by which answers are the same text."""
    rule.needs_opinions = True  # type: ignore[attr-defined]
    return without_vectors(rule)


def products(points: Tensor, vectors: Tensor) -> Tensor:
    """Inner products, (p, C), of one point for each prompt, (p, 1, D), with that prompt's vectors, (p, C, D)."""
    # A row times the transposed matrix: on a CPU a batch of that takes a tenth of the time of matrix times column.
    return torch.bmm(points, vectors.transpose(1, 2)).squeeze(1)


def elect(scores: Tensor, priority: Tensor) -> Tensor:
    """Index of the highest score, (p,), for `scores` (p, C); of all within `TOLERANCE`, the one of highest priority."""
    equal = scores >= scores.amax(dim=1, keepdim=True) - TOLERANCE
    return _only(equal, priority).argmax(dim=1)


@without_vectors
def medoid(ballots: Ballots) -> Tensor:
    """The answer most similar to the others: (e_i . sum_j e_j - 1) / (n - 1), exactly."""
    return ballots.similarity


def weighted_medoid(ballots: Ballots) -> Tensor:
    """The medoid if answer j were there w_j times: the greatest sum_j w_j e_i . e_j, its own weight included.

    An answer of weight 0 has no vote and is not elected, unless all have weight 0; then all count the same.
    """
    if ballots.weights is None:
        raise ValueError("rule weighted_medoid needs the weights of the clients")
    weights = ballots.weights * ballots.shares
    weights = weights.where(weights.any(dim=1, keepdim=True), ballots.shares)
    return _only(weights > 0, ballots.nearness(_parts(weights)))


def geometric_median(ballots: Ballots) -> Tensor:
    """The answer nearest to the geometric median of all answers, which less than half of them cannot move arbitrarily.

    Weiszfeld's iteration from the mean, with a fixed number of steps and distances no smaller than a smoothing constant
    (K. Pillutla, S. Kakade, Z. Harchaoui, "Robust Aggregation for Federated Learning", arXiv:1912.13445, algorithm 2).
    """
    vectors = ballots.vectors
    shares = ballots.shares / ballots.shares.sum(dim=1, keepdim=True).clamp(min=1)
    for _ in range(WEISZFELD_STEPS):
        median = torch.bmm(shares[:, None, :], vectors)
        squared_distances = 1 - 2 * products(median, vectors) + median.square().sum(dim=2)
        pulls = squared_distances.clamp(min=WEISZFELD_SMOOTHING**2).rsqrt() * ballots.shares
        shares = _parts(pulls)
    return ballots.nearness(shares)


def trimmed(ballots: Ballots, *, trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2) -> Tensor:
    """The medoid of the answers that are left when the share `trim`, those least similar to the others, is dropped.

    The number of votes to drop is rounded down, so of few answers none may be dropped. Among equals, those of lowest
    priority are dropped.
    """
    similarity = _only(ballots.present, ballots.similarity)
    votes = ballots.shares.double()
    num_dropped = (trim * votes.sum(dim=1, keepdim=True) + 1e-9).floor()
    up_to_each = votes.gather(1, similarity.argsort(dim=1)).cumsum(dim=1)
    num_kept = (up_to_each > num_dropped + TOLERANCE).sum(dim=1, keepdim=True).clamp(min=1)
    lowest_kept = similarity.sort(dim=1, descending=True).values.gather(1, num_kept - 1)
    above = similarity > lowest_kept + TOLERANCE
    equal = (similarity >= lowest_kept - TOLERANCE) & ~above
    by_priority = ballots.priority.argsort(dim=1, descending=True)
    places = equal.gather(1, by_priority).cumsum(dim=1).gather(1, by_priority.argsort(dim=1))
    kept = above | (equal & (places <= num_kept - above.sum(dim=1, keepdim=True)))
    return _only(kept, ballots.nearness(_parts(kept * ballots.shares)))


def plurality(ballots: Ballots, *, min_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.8) -> Tensor:
    """The medoid of the most common opinion: a plurality vote for free text.

    An answer's opinion is the set of answers whose cosine to it is `min_cosine` or more. The set of most votes wins; of
    equal ones, that of the answer most similar to all others, then that of highest priority. This is the first
    cluster of the greedy scheme of X. Daura et al., "Peptide Folding: When Simulation Meets Experiment", Angew. Chem.
    Int. Ed. 38 (1999), which needs no seeds and no number of clusters; its further clusters cannot win. When no two
    answers agree, the medoid is elected.
    """
    least = min_cosine - TOLERANCE
    votes = ballots.shares.double()[:, :, None]
    sizes = torch.cat(
        [torch.bmm((block >= least).double(), votes).squeeze(2) for _, block in _cosines(ballots)], dim=1
    )
    sizes = _only(ballots.present, sizes)
    largest = (sizes >= sizes.amax(dim=1, keepdim=True) - TOLERANCE) & ballots.present
    centre = elect(_only(largest, ballots.similarity), ballots.priority)[:, None]
    at_centre = ballots.vectors.gather(1, centre[:, :, None].expand(-1, -1, ballots.vectors.shape[2]))
    around = products(at_centre.double(), ballots.vectors.double())
    members = ((around >= least) & ballots.present).scatter(1, centre, True)
    return _only(members, ballots.nearness(_parts(members * ballots.shares)))


@by_text
def mode(ballots: Ballots) -> Tensor:
    """The most common text, but for case, spaces and punctuation; of equally common ones, that most similar to all.

    The vote of self-consistency (X. Wang et al., arXiv:2203.11171) over clients, for short answers. It is `plurality`
    with a `min_cosine` of 1, without comparing all pairs: O(C) a prompt. When no two answers are the same text, the
    medoid is elected.
    """
    places, votes = ballots.opinions.clamp(min=0), ballots.shares.double()
    counts = torch.zeros_like(votes).scatter_add_(1, places, votes).gather(1, places)
    counts = _only(ballots.present, counts)
    return _only(counts >= counts.amax(dim=1, keepdim=True) - TOLERANCE, ballots.similarity)


def multi_krum(ballots: Ballots, *, num_byzantine: Annotated[int, Field(ge=0)] = 1) -> Tensor:
    """The answer with the lowest Krum score: the sum of squared distances to its n - f - 2 nearest.

    P. Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017, with
    f = `num_byzantine` and n the number of clients that answered. For unit vectors the lowest sum is the greatest mean
    cosine to those neighbours, which is the score here. Multi-Krum averages the best few; texts have no average, so the
    best one is taken. The guarantee needs n >= 2 f + 3. With fewer answers the rule still elects one, by its n - f - 2
    nearest, at least one.
    """
    votes, voters = ballots.shares.double(), ballots.voters
    num_others = (votes.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    num_farthest = (num_others - 1).clamp(min=0, max=num_byzantine + 1)
    most = min((num_byzantine + 1) * int(voters.bincount().max()), len(voters))
    scores = []
    for rows, block in _cosines(ballots):
        own = (voters[rows, None] == voters).expand_as(block)
        totals = torch.bmm(block.masked_fill_(own, 0.0), votes[:, :, None]).squeeze(2)
        # The farthest are few: leaving them out of the sum is much cheaper than sorting out the nearest.
        farthest = block.masked_fill_(own | ~ballots.present[:, None, :], torch.inf).topk(most, dim=2, largest=False)
        theirs = votes[:, None, :].expand_as(block).gather(2, farthest.indices)
        before = theirs.cumsum(dim=2) - theirs
        taken = (num_farthest[:, :, None] - before).clamp(min=0).minimum(theirs)
        left_out = (farthest.values.where(farthest.values < torch.inf, 0.0) * taken).sum(dim=2)
        scores.append((totals - left_out) / (num_others - num_farthest).clamp(min=1))
    return torch.cat(scores, dim=1)


@without_vectors
def random_client(ballots: Ballots) -> Tensor:
    """A control: the first sample of any of the clients, all equally likely. All scores are equal, so the random
    priority decides."""
    earliest = torch.full_like(ballots.voters, len(ballots.voters))
    columns = torch.arange(len(ballots.voters), device=ballots.voters.device)
    earliest = earliest.scatter_reduce(0, ballots.voters, columns, "amin")
    return _only(columns == earliest[ballots.voters], torch.zeros_like(ballots.similarity))


@without_vectors
def longest(ballots: Ballots) -> Tensor:
    """A control: the answer with the most characters."""
    return _lengths(ballots)


@without_vectors
def shortest(ballots: Ballots) -> Tensor:
    """A control: the answer with the fewest characters."""
    return -_lengths(ballots)


def _lengths(ballots: Ballots) -> Tensor:
    if ballots.lengths is None:
        raise ValueError("rules longest and shortest need the lengths of the answers")
    return ballots.lengths.double()


def _parts(votes: Tensor) -> Tensor:
    """Votes, weights or the like, (p, C), as parts of their sum."""
    return votes / votes.sum(dim=1, keepdim=True).clamp(min=1e-30)


def _only(eligible: Tensor, scores: Tensor) -> Tensor:
    return scores.where(eligible, -torch.inf)


def _cosines(ballots: Ballots) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines between answers, a block of rows at a time: row indices (b,) and rows (p, b, C) float64."""
    vectors = ballots.vectors.double()
    num_prompts, num_clients, _ = vectors.shape
    num_rows = max(1, ballots.block_bytes // (vectors.element_size() * num_prompts * num_clients))
    for start in range(0, num_clients, num_rows):
        rows = torch.arange(start, min(start + num_rows, num_clients), device=vectors.device)
        yield rows, torch.bmm(vectors[:, start : start + num_rows], vectors.transpose(1, 2))
