"""How good each client seems to be at each prompt, from answers alone, or by the few whose right answer is known.

Legend: P prompts, B ballots to each, N clients, D embedding dimension.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.consensus.evidence import Evidence
from semcons_ray.consensus.rules import TOLERANCE
from semcons_ray.errors import ConfigError

_BLOCK = 2**22
"""Most cosines between prompts that are computed at once."""


def expertise(
    evidence: Evidence,
    *,
    neighbours: Annotated[int, Field(ge=1)] = 16,
    even: Annotated[float, Field(gt=0, le=1)] = 0.5,
) -> Tensor:
    """How much a client agrees with others beyond chance, at prompts like this one.

    Clients that know something give the same answers, since a question has one right answer and many wrong ones. But so
    do clients that say "1" whatever they are asked, and they agree more. What tells them apart is that their answers to
    this prompt agree no better than those to other prompts. So a client's agreement at a prompt is the share of the
    other clients' votes there that are for its answer, and its chance agreement the share of their votes at all other
    prompts that are: the difference is what its answer owes to the question. Both are averaged over the `neighbours`
    prompts whose vectors are nearest, which makes a client expert in a part, and a = agreement, c = chance give
    x = (a - c) / (1 - c), as in Cohen's kappa, or 0 if that is negative. The weight is `even` + (1 - `even`) x / mean
    x, with the mean over all clients and prompts: since estimates are noisy, some of all weight is given evenly, and
    most of it where nobody seems to be expert.

    The prompt itself is not among its neighbours: no answer speaks for itself.

    x is the payment of multi-task peer prediction, which is highest for those who answer by what they know (A.
    Dasgupta, A. Ghosh, "Crowdsourced judgement elicitation with endogenous proficiency", WWW 2013), as a weight;
    neighbourhoods are those of Smoothie (arXiv:2412.04692). Time is O(P B + P^2 (D + N)), memory O(P B) and a
    block of cosines.

    Agreement is noisy with one sample a client; several (`generation.num_samples`) make it, and the vote, better. Liars
    that all send one text lose weight by it, and those that agree on another lie for each prompt gain much: it does not
    replace a defence.
    """
    if evidence.prompts is None:
        raise ValueError("competence expertise needs the vectors of the prompts")
    given = (evidence.of_clients(evidence.shares) > 0).double()
    agreement, chance = _agreement(evidence, given)
    near, by_chance = _among_neighbours(evidence.prompts, (agreement, chance), given, neighbours)
    beyond = ((near - by_chance) / (1 - by_chance).clamp(min=TOLERANCE)).clamp(min=0) * given
    mean = beyond.sum() / given.sum().clamp(min=1)
    relative = (beyond / mean.clamp(min=TOLERANCE)).where(mean > TOLERANCE, 1.0)
    return (even + (1 - even) * relative)[:, evidence.voters].float()


def sentinels(
    evidence: Evidence,
    *,
    neighbours: Annotated[int, Field(ge=1)] = 4,
    even: Annotated[float, Field(gt=0, le=1)] = 0.1,
) -> Tensor:
    """How often a client is right at the known prompts that are most like this one.

    The server knows the answers to `prompts.sentinels` of the public prompts, and clients do not know to which. A
    client's weight at a prompt is its mean share of right draws at the `neighbours` known prompts whose vectors are
    nearest, all that are as near as the last one among them; a share `even` of it is given to all, since a few prompts
    are a noisy measure. Time and memory are O(P K D) and O(P K) for K known prompts.

    Raises:
        ConfigError: The server knows no answers.
    """
    if evidence.known is None or evidence.prompts is None:
        raise ConfigError("algorithm.competence sentinels needs prompts.sentinels over 0: known answers")
    known, rates = evidence.rates_where_known()
    cosines = evidence.prompts @ evidence.prompts[known].T
    farthest = cosines.topk(min(neighbours, len(known)), dim=1).values[:, -1:]
    near = (cosines >= farthest - TOLERANCE).float()
    mean = near @ rates / near.sum(dim=1, keepdim=True)
    return (even + (1 - even) * mean)[:, evidence.voters]


def _agreement(evidence: Evidence, given: Tensor) -> tuple[Tensor, Tensor]:
    """For each client the share of other clients' votes that are for its answer: at the prompt, and at all others;
    each (P, N), where `given` says who answered which prompt."""
    shares = evidence.shares.double().T.contiguous()  # by ballot, as clients are gone through one by one
    num_ballots, num_prompts = shares.shape
    # An answer's text has one number at each prompt, and one anywhere.
    here = evidence.opinions.T.clamp(min=0) + num_ballots * torch.arange(num_prompts, device=shares.device)
    anywhere = evidence.texts.T.clamp(min=0).contiguous()
    totals = [torch.zeros(shares.numel(), device=shares.device, dtype=shares.dtype) for _ in range(2)]
    own = torch.zeros_like(totals[0])
    agreeing = shares.new_zeros(2, evidence.num_clients, num_prompts)
    for total, numbers in zip(totals, (here, anywhere), strict=True):
        total.index_add_(0, numbers.flatten(), shares.flatten())
    by_client = torch.split(evidence.voters.argsort(stable=True), evidence.voters.bincount().tolist())
    for client, ballots in enumerate(by_client):
        votes = shares[ballots]
        for kind, numbers in enumerate((here[ballots], anywhere[ballots])):
            own.index_add_(0, numbers.flatten(), votes.flatten())
            agreeing[kind, client] = (votes * (totals[kind][numbers] - own[numbers])).sum(dim=0)
            own[numbers] = 0
    others = given.sum(dim=1, keepdim=True) - given
    at_prompt, at_all = agreeing.transpose(1, 2)
    at_others = at_all - at_prompt
    return at_prompt / others.clamp(min=1), at_others / (others.sum(dim=0) - others).clamp(min=1)


def _among_neighbours(
    prompts: Tensor, values: tuple[Tensor, Tensor], given: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Means of values, each (P, N), over those of the prompts nearest to each that a client answered; 0 if it answered
    none.

    All that are as near as the last one belong to them, so that the order of the prompts decides nothing.
    """
    known = torch.cat([*(value * given for value in values), given], dim=1).float()
    num_prompts, num_clients = given.shape
    sums = torch.zeros_like(known)
    rows = max(1, _BLOCK // num_prompts)
    for start in range(0, num_prompts if num_prompts > 1 else 0, rows):
        cosines = prompts[start : start + rows].float() @ prompts.float().T
        cosines.diagonal(start).fill_(-torch.inf)
        farthest = cosines.topk(min(neighbours, num_prompts - 1), dim=1).values[:, -1:]
        sums[start : start + rows] = (cosines >= farthest - TOLERANCE).float() @ known
    one, other, counts = torch.split(sums.double(), num_clients, dim=1)
    return one / counts.clamp(min=1), other / counts.clamp(min=1)
