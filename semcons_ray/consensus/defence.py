"""A defence against clients that work together, which need not be many, since they say the same where honest clients
differ.

Legend: P prompts, B ballots to each, N clients, D embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.consensus.evidence import Evidence, Ruling

SKETCH = 2**20
"""Numbers that the sketches of all clients' answers have together, at least D for each client."""


SURE = {1.0: 1, 0.75: 3}
"""Shares of its draws with which a client gives an answer that it is taken to be sure of, each looked at by itself, and
how many times the margin clients may then agree more than is usual: a lesser sureness is less of a sign."""

IN_COMMON = 2 / 3
"""Colluders have at least this share of the answers that they are sure of in common, or of the fewer of the two."""

ECHO = 0.95
"""Cosine of an answer to its prompt from which on it says nothing else."""


@dataclass(frozen=True)
class Independent:
    """Takes the votes of clients that agree with one another more than honest clients do.

    Clients draw their answers. Two honest ones that know something give the same answer with some of their draws;
    colluders are sure of the same answers, with all or most of their draws, since that is how few win. So what is looked
    at is how often two clients are sure of one answer (`sure_agreement`), and, for answers that say the same in other
    words, `likeness`. Each client has one that agrees with it most. What most clients have in common with that one is
    usual, however much it is: models of one base have habits in common, and agree in errors, too. Clients that have more
    in common than is usual, by `margin` and by as much again as is usual, and at least `IN_COMMON` of what they are sure
    of, are linked. Those linked, also by way of
    others, are taken to work together unless they are over half of all: they lose their votes, and their trust, which
    grows back by `recovery` in each round in which nothing is found.

    What it does not find: colluders that spread their draws as honest clients do; that say the same on a share of the
    prompts within the margin only; or that are half of all. Honest clients that alone are sure of something, where most
    clients are sure of nothing, would be taken for colluders. Of clients with one answer each all are sure, so there only
    those are found that agree on nearly everything. experiments/attack has figures.

    An answer that is its own prompt again counts for nothing, as an echo is like any other answer.

    Attributes:
        margin: Share of the prompts.
        recovery: By how much trust, from 0 to 1, grows back in a round.
        max_wins: See `Defence`.
    """

    margin: Annotated[float, Field(ge=0, le=1)] = 0.05
    recovery: Annotated[float, Field(ge=0, le=1)] = 0.25
    max_wins: Annotated[float, Field(gt=0, le=1)] = 0.5

    def __call__(self, evidence: Evidence) -> Ruling:
        """See `Defence`."""
        alike, echoes = _likeness(evidence)
        linked = _beyond_usual(alike, self.margin)
        for sureness, times in SURE.items():
            agreement = sure_agreement(evidence, sureness)
            sure = agreement.diagonal()
            linked |= _beyond_usual(agreement, times * self.margin) & (
                agreement >= IN_COMMON * torch.minimum(sure[:, None], sure)
            )
        together = components(linked)
        size = together.bincount(minlength=evidence.num_clients)[together]
        suspect = (size > 1) & (2 * size <= evidence.num_clients)
        trust = (evidence.trust + self.recovery).clamp(max=1).masked_fill(suspect, 0.0)
        return Ruling(trust[evidence.voters].expand_as(evidence.shares).masked_fill(echoes, 0.0), trust)


def _beyond_usual(agreement: Tensor, margin: float) -> Tensor:
    """Which clients have more in common than is usual, (N, N) bool."""
    others = agreement.clone().fill_diagonal_(-torch.inf)
    usual = others.amax(dim=1).clamp(min=0).median()
    return others > usual + usual.clamp(min=margin)


def sure_agreement(evidence: Evidence, sureness: float) -> Tensor:
    """Share of the prompts at which two clients give the same answer with at least the share `sureness` of their draws,
    which is over a half, (N, N) float32.

    It is exact as long as N P B is at most `SKETCH`. Beyond, each answer to a prompt is one of so many buckets and has a
    sign, both by hash, and a client's sketch has the sums of signs of its answers by bucket. The product of two sketches
    is by expectation what they have in common, with a noise of one in the root of the number of buckets (M. Charikar,
    K. Chen, M. Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002).
    """
    num_prompts, num_ballots = evidence.present.shape
    num_buckets = max(1, SKETCH // evidence.num_clients)
    answers = evidence.opinions + num_ballots * torch.arange(num_prompts, device=evidence.opinions.device)[:, None]
    answers, shares = answers[evidence.present], evidence.shares[evidence.present]
    voters = evidence.voters.expand_as(evidence.present)[evidence.present]
    if not _draws_once(evidence):
        keys, places = (answers * evidence.num_clients + voters).unique(return_inverse=True)
        shares = torch.zeros(len(keys), device=shares.device).index_add_(0, places, shares)
        answers, voters = keys // evidence.num_clients, keys % evidence.num_clients
    signs = (shares >= sureness - 1e-6).float()
    if num_prompts * num_ballots > num_buckets:
        answers = _mixed(answers)
        signs = signs * (1 - 2 * ((answers >> 40) & 1))
        answers = answers % num_buckets
    sketch = torch.zeros(evidence.num_clients * num_buckets, device=signs.device)
    sketch = sketch.index_add_(0, voters * num_buckets + answers, signs).view(evidence.num_clients, num_buckets)
    return sketch @ sketch.T / max(num_prompts, 1)


def _draws_once(evidence: Evidence) -> bool:
    """Whether each client has one ballot."""
    return len(evidence.voters) == evidence.num_clients


def likeness(evidence: Evidence) -> Tensor:
    """How alike two clients' answers are, beyond what all have in common, (N, N) float32.

    It is the correlation of vectors: the mean product of what is left of two clients' answers when what an answer
    shares with its prompt is removed, and then the mean over clients, divided by the variance of a single answer. So it
    is 1 for clients of which each gives one answer, and the same, and 0 for strangers.

    It is exact as long as N P D is at most `SKETCH`. Beyond, the vectors of several prompts are added up with random
    signs for each dimension, whose products give the sum over prompts by expectation (N. Alon, Y. Matias, M. Szegedy,
    "The Space Complexity of Approximating the Frequency Moments", 1996), with a noise of one in the root of N P D.
    """
    return _likeness(evidence)[0]


def components(linked: Tensor) -> Tensor:
    """The lowest number of a client to which each is linked, also by way of others, (N,) int64, for `linked` (N, N)."""
    numbers = torch.arange(len(linked), device=linked.device)
    linked = linked | linked.T
    while True:
        lowest = numbers.expand_as(linked).where(linked, len(linked)).amin(dim=1).minimum(numbers)
        if torch.equal(lowest, numbers):
            return numbers
        numbers = lowest


def _likeness(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """See `likeness`; and which answers are echoes of their prompt, (P, B) bool."""
    num_prompts, num_ballots, dimension = evidence.vectors.shape
    num_clients, device = evidence.num_clients, evidence.vectors.device
    num_groups = min(max(1, SKETCH // max(num_clients * dimension, 1)), num_prompts)
    generator = torch.Generator().manual_seed(0)
    signs = (1 - 2 * torch.randint(2, (num_prompts, dimension), generator=generator)).float().to(device)
    sketch = torch.zeros(num_groups, num_clients, dimension, device=device)
    to_prompt = torch.zeros(num_prompts, num_ballots, device=device)
    for chunk in evidence.chunks:
        for prompt in range(*chunk.indices(num_prompts)):
            vectors = evidence.vectors[prompt].float()
            if not bool(evidence.present[prompt].all()):
                vectors = vectors.where(evidence.present[prompt, :, None], 0.0)
            if evidence.prompts is not None:
                to_prompt[prompt] = vectors @ evidence.prompts[prompt]
            into = sketch[prompt % num_groups]
            if _draws_once(evidence):
                into.addcmul_(vectors, signs[prompt])
            else:
                into.index_add_(0, evidence.voters, vectors * (evidence.shares[prompt, :, None] * signs[prompt]))
    if evidence.prompts is not None:
        shared = evidence.of_clients(to_prompt * evidence.shares)
        along = signs * evidence.prompts
        for place in range(num_groups):
            sketch[place].addmm_(shared[place::num_groups].T, along[place::num_groups], alpha=-1)
    centre = sketch.mean(dim=1, keepdim=True)
    left = ((1 - to_prompt.square()) * evidence.shares).sum() / num_clients
    variance = (left - centre.square().sum()) / num_prompts
    flat = (sketch - centre).transpose(0, 1).reshape(num_clients, -1)
    return flat @ flat.T / num_prompts / variance.clamp(min=1e-6), to_prompt > ECHO


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of whole numbers from 0, (...) int64 not negative: the finisher of splitmix64."""
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        numbers = (numbers ^ (numbers >> 30) & 0x3FFFFFFFF) * factor
    return (numbers ^ (numbers >> 31)) & 0x7FFFFFFFFFFFFFFF
