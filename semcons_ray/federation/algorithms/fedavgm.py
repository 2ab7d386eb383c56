"""FedAvgM on LoRA adapters: FedAvg whose server has momentum.

Source: T.-M. H. Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", arXiv:1909.06335, section 4.2: v <- beta v + Delta and w <- w + v, where Delta is the mean change of
the clients' weights (the paper's has the opposite sign, and is subtracted).

Where this departs from it: a factor of v, the server's learning rate, is that of S. J. Reddi et al., arXiv:2003.00295;
the paper has 1. The look-ahead of Nesterov's method, with which its experiments ran, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.federation.algorithms.fedopt import FedOpt, Moments


@dataclass(frozen=True)
class FedAvgM(FedOpt):
    """FedAvg-LoRA with momentum at the server; with a `momentum` of 0 and a learning rate of 1 it is FedAvg.

    Attributes:
        momentum: beta, the share of v that the next round keeps.
        server_learning_rate: Factor of v in the server's step.
    """

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0

    def step(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """Along v, which begins at 0."""
        (velocity,) = moments or (torch.zeros_like(change),)
        velocity = self.momentum * velocity + change
        return self.server_learning_rate * velocity, (velocity,)
