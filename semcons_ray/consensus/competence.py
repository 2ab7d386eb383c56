"""How good each client seems to be at each prompt, from answers alone: which are right is not known.

Legend: P prompts, B ballots to each, N clients, D embedding dimension.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.consensus.evidence import Evidence
from semcons_ray.consensus.rules import TOLERANCE

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
    x = (a - c) / (1 - c), as in Cohen's kappa, or 0 if that is negative. A share `even` of all weight is given to the
    clients evenly, since estimates are noisy and a part may have no expert, and the rest by x.

    The prompt itself is not among its neighbours: what a client says to a prompt gives it no weight there.

    It is the payment of multi-task peer prediction, which is highest for those who answer by what they know (A.
    Dasgupta, A. Ghosh, "Crowdsourced judgement elicitation with endogenous proficiency", WWW 2013, section 3), as a
    weight; neighbourhoods are those of Smoothie (arXiv:2412.04692). Time is O(P B log(P B) + P^2 (D + N)), memory
    O(P B) and a block of cosines.
    """
    if evidence.prompts is None:
        raise ValueError("competence expertise needs the vectors of the prompts")
    given = (evidence.of_clients(evidence.shares) > 0).double()
    agreement, chance = _agreement(evidence, given)
    near, by_chance = _among_neighbours(evidence.prompts, (agreement, chance), given, neighbours)
    beyond = ((near - by_chance) / (1 - by_chance).clamp(min=TOLERANCE)).clamp(min=0) * given
    mean = beyond.sum(dim=1, keepdim=True) / given.sum(dim=1, keepdim=True).clamp(min=1)
    relative = (beyond / mean.clamp(min=TOLERANCE)).where(mean > TOLERANCE, 1.0)
    return (even + (1 - even) * relative)[:, evidence.voters].float()


def _agreement(evidence: Evidence, given: Tensor) -> tuple[Tensor, Tensor]:
    """For each client the share of other clients' votes that are for its answer: at the prompt, and at all others;
    each (P, N), where `given` says who answered which prompt."""
    texts, voters, shares = evidence.texts, evidence.voters, evidence.shares.double()
    prompts = torch.arange(len(texts), device=texts.device)[:, None]

    def votes(*keys: Tensor) -> Tensor:
        """For each ballot, all votes for its text that have the same of these keys, (P, B)."""
        combined = texts
        for key in keys:
            combined = combined * (int(key.max()) + 1) + key
        _, places = combined.unique(return_inverse=True)
        sums = shares.new_zeros(int(places.max()) + 1).index_add_(0, places.flatten(), shares.flatten())
        return sums[places]

    here = votes(prompts) - votes(prompts, voters)
    elsewhere = votes() - votes(voters) - here
    others = given.sum(dim=1, keepdim=True) - given
    others_elsewhere = others.sum(dim=0) - others
    agreement = evidence.of_clients(shares * here) / others.clamp(min=1)
    chance = evidence.of_clients(shares * elsewhere) / others_elsewhere.clamp(min=1)
    return agreement, chance


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
    one, other, counts = sums.double().split(num_clients, dim=1)
    return one / counts.clamp(min=1), other / counts.clamp(min=1)
