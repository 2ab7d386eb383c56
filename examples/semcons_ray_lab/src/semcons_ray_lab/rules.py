"""A consensus rule of one's own: a medoid that looks at near answers more than at far ones."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.consensus.rules import Ballots


@dataclass(frozen=True)
class SoftMedoid:
    """Elects the answer of the highest density: T log of the mean of exp(cosine / T) over all answers.

    A rule scores the answers to p prompts by C ballots at once, and the highest score wins. `Ballots` has what it may
    go by; its docstring says what. Fields of the class are options of the rule: they are given by
    algorithm.rule_options, converted to their types and checked before a run begins.

    Attributes:
        temperature: T. The lower, the more an answer is judged by those that are nearest to it; the higher, the nearer
            the rule is to the medoid, which goes by the mean cosine.
    """

    temperature: Annotated[float, Field(gt=0)] = 0.1

    def __call__(self, ballots: Ballots) -> Tensor:
        """Scores, (p, C)."""
        vectors = ballots.vectors.double()
        cosines = vectors @ vectors.transpose(1, 2)
        # A client's samples share its one vote, and an answer that is missing has none.
        weights = ballots.shares.double().log()[:, None, :]
        return self.temperature * torch.logsumexp(cosines / self.temperature + weights, dim=2)
