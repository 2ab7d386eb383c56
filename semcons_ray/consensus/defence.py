"""A defence against clients that work together, which need not be many, since they say the same where honest clients
differ.

Legend: P prompts, B ballots to each, N clients, D embedding dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.consensus.evidence import Evidence, Ruling
from semcons_ray.consensus.tallies import present_vectors

SKETCH = 2**20
"""Numbers that the sketches of all clients' answers have together; of vectors at least D for each client."""

LOOKED_AT = 512
"""Prompts on which `likeness` is looked at, at most."""

SIGNS = ((1.0, True, 1), (1.0, False, 2), (0.75, False, 4))
"""Each a share of its draws with which a client gives an answer that it is taken to be sure of; whether only answers
count that nobody gives hesitantly; and how many times the margin clients may then agree more than is usual."""

HESITANT = 0.5
"""Share of its draws up to which a client gives an answer hesitantly."""

ALIKE = 0.5
"""Colluders have at least this correlation, which is below 1 since they are a part of the mean that is removed."""

IN_COMMON = 2 / 3
"""Colluders have at least this share of the answers that they are sure of in common, or of the fewer of the two."""

PROOF = 2
"""By how many known answers a client must do better than those who are not suspected, to be trusted all the same."""

ECHO = 0.95
"""Cosine of an answer to its prompt above which it says nothing else."""

NEAR_PROMPT = 0.75
"""Mean cosine of all answers to a prompt above which none is an echo, as where both are embedded together."""


@dataclass(frozen=True)
class Independent:
    """Takes the votes of clients that agree with one another more than honest clients do.

    Clients draw their answers. Two honest ones that know something give the same answer with some of their draws;
    colluders are sure of the same answers, with all or most of their draws, since that is how few win. So what counts
    is how often two clients are sure of one answer (`sure_agreement`), above all of one that nobody gives hesitantly,
    which what is true or often believed seldom is; and, for answers that say the same in other words, `likeness`. Each
    client has one that agrees with it most. What most clients have in common with that one is usual, however much it
    is: models of one base have habits in common, and agree in errors, too. Two clients that have more in common than is
    usual, by `margin` and by as much again as is usual, and much in any case (`IN_COMMON`, `ALIKE`), are taken to work
    together: they lose their votes, and their trust, which grows back by `recovery` in each round in which nothing is
    found. What most clients do is never found, so no honest majority is.

    What it does not find: colluders that spread their draws as honest clients do; that say the same on a share of the
    prompts within the margin only; or that are half of all. Clients with one answer to a prompt are sure of all, so of
    them only those are found that agree on nearly everything.

    What it finds wrongly: a few clients that know much more than the others, as strong models among weak ones, agree on
    what nobody else says, like colluders. Only right answers tell the two apart: where the server knows some
    (`prompts.sentinels`), clients keep their votes that are right at these more often, by `PROOF`, than the most common
    text of those who are not suspected. experiments/attack has figures.

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
        alike, echoes = likeness(evidence)
        linked = _beyond_usual(alike, self.margin) & (alike >= ALIKE)
        all_are_sure = torch.equal(evidence.shares, evidence.present.float())
        for sureness, undoubted, times in SIGNS:
            if all_are_sure and (undoubted or sureness < 1):  # this would say what another sign does
                continue
            agreement = sure_agreement(evidence, sureness, undoubted=undoubted)
            sure = agreement.diagonal()
            linked |= _beyond_usual(agreement, times * self.margin) & (
                agreement >= IN_COMMON * torch.minimum(sure[:, None], sure)
            )
        found = linked.any(dim=1)
        found &= ~_proven(evidence, found)
        trust = (evidence.trust + self.recovery).clamp(max=1).masked_fill(found, 0.0)
        return Ruling(trust[evidence.voters].expand_as(evidence.shares).masked_fill(echoes, 0.0), trust)


def _beyond_usual(agreement: Tensor, margin: float) -> Tensor:
    """Which clients have more in common than is usual, (N, N) bool."""
    others = agreement.clone().fill_diagonal_(-torch.inf)
    usual = others.amax(dim=1).clamp(min=0).median()
    return others > usual + usual.clamp(min=margin)


def _proven(evidence: Evidence, suspects: Tensor) -> Tensor:
    """Which clients do better than those who are not suspected, where the server knows the answers, (N,) bool."""
    if evidence.known is None:
        return torch.zeros_like(suspects)
    at, rates = evidence.rates_where_known()
    unsuspected = evidence.shares[at] * ~suspects[evidence.voters]
    votes = torch.zeros_like(unsuspected).scatter_add_(1, evidence.opinions[at].clamp(min=0), unsuspected)
    return rates.sum(dim=0) >= (votes.argmax(dim=1) == evidence.known[at]).sum() + PROOF


def sure_agreement(evidence: Evidence, sureness: float, *, undoubted: bool = False) -> Tensor:
    """Share of the prompts at which two clients give the same answer with at least the share `sureness` of their draws,
    which is over a half, (N, N) float32; if `undoubted`, only of answers that no client gives hesitantly (`HESITANT`).

    It is exact as long as N P B is at most `SKETCH`. Beyond, each answer to a prompt is one of so many buckets and has
    a sign, both by hash, and a client's sketch has the sums of signs of its answers by bucket. The product of two
    sketches is by expectation what they have in common, with a noise of one in the root of the number of buckets
    (M. Charikar, K. Chen, M. Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002).
    """
    num_prompts, num_ballots = evidence.present.shape
    num_buckets = max(1, SKETCH // evidence.num_clients)
    answers, voters, shares = evidence.held
    signs = (shares >= sureness - 1e-6).float()
    if undoubted:
        hesitant = ((shares > 0) & (shares <= HESITANT + 1e-6)).float()
        doubters = torch.zeros(num_prompts * num_ballots, device=signs.device).index_add_(0, answers, hesitant)
        signs *= doubters[answers] == 0
    if num_prompts * num_ballots > num_buckets:
        answers = _mixed(answers)
        signs *= 1 - 2 * ((answers >> 40) & 1)
        answers %= num_buckets
    sketch = torch.zeros(evidence.num_clients * num_buckets, device=signs.device)
    sketch = sketch.index_add_(0, voters * num_buckets + answers, signs).view(evidence.num_clients, num_buckets)
    return sketch @ sketch.T / max(num_prompts, 1)


def likeness(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """How alike two clients' answers are, beyond what all have in common; and which answers are their prompt again.

    It is the correlation of vectors: the mean product of what is left of two clients' answers when what an answer
    shares with its prompt is removed, and then the mean over clients; divided by the mean square of what is left of a
    single answer. So of clients that give one answer each it is near 1 for few that give the same, and 0 for strangers.

    It is exact as long as N P D is at most `SKETCH`. Beyond, every so many prompts are looked at, `LOOKED_AT` at most,
    and vectors of several prompts are added up with random signs for each dimension: products of such sums are by
    expectation the sum of products (N. Alon, Y. Matias, M. Szegedy, "The Space Complexity of Approximating the
    Frequency Moments", STOC 1996), with a noise of one in the root of the numbers that a client's sketch has.

    Returns:
        The correlation, (N, N) float32, and whether an answer is an echo (`ECHO`, `NEAR_PROMPT`), (P, B).
    """
    num_prompts, num_ballots, dimension = evidence.vectors.shape
    num_clients, device, alone = evidence.num_clients, evidence.vectors.device, evidence.has_one_ballot_each
    step = max(1, math.ceil(num_prompts / LOOKED_AT))
    places = range(0, num_prompts, step)
    num_groups = min(max(1, SKETCH // max(num_clients * dimension, 1)), len(places))
    generator = torch.Generator().manual_seed(0)
    signs = (1 - 2 * torch.randint(2, (len(places), dimension), generator=generator)).to(device, torch.float32)
    sketch = torch.zeros(num_groups, num_clients, dimension, device=device)
    to_prompt = torch.zeros(num_prompts, num_ballots, device=device)
    for prompt in range(num_prompts):
        (vectors,) = present_vectors(evidence.vectors[prompt : prompt + 1], evidence.present[prompt : prompt + 1])
        if evidence.prompts is not None:
            to_prompt[prompt] = vectors @ evidence.prompts[prompt]
        place = prompt // step
        if prompt % step == 0 and alone:
            sketch[place % num_groups].addcmul_(vectors, signs[place])
        elif prompt % step == 0:
            shared = vectors * evidence.shares[prompt, :, None] * signs[place]
            sketch[place % num_groups].index_add_(0, evidence.voters, shared)
    if evidence.prompts is not None:
        along = evidence.of_clients(to_prompt * evidence.shares)[::step]
        prompts = signs * evidence.prompts[::step]
        for group in range(num_groups):
            sketch[group].addmm_(along[group::num_groups].T, prompts[group::num_groups], alpha=-1)
    centre = sketch.mean(dim=1, keepdim=True)
    left = ((1 - to_prompt.square()) * evidence.shares)[::step].sum() / num_clients - centre.square().sum()
    flat = (sketch - centre).transpose(0, 1).reshape(num_clients, -1)
    mean = to_prompt.sum(dim=1, keepdim=True) / evidence.present.sum(dim=1, keepdim=True).clamp(min=1)
    return flat @ flat.T / left.clamp(min=1e-6), (to_prompt > ECHO) & (mean <= NEAR_PROMPT)


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of whole numbers from 0, (...) int64 not negative: the finisher of splitmix64."""
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        numbers = (numbers ^ (numbers >> 30 & 0x3FFFFFFFF)) * factor
    return (numbers ^ (numbers >> 31)) & 0x7FFFFFFFFFFFFFFF
