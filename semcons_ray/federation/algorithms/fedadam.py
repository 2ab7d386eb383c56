"""FedAdam on LoRA adapters: FedAvg whose server steps with Adam.

Source: S. J. Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295, algorithm 2, FedAdam: with Delta the
mean change of the clients' weights, m <- beta1 m + (1 - beta1) Delta, v <- beta2 v + (1 - beta2) Delta^2, and
x <- x + eta m / (sqrt(v) + tau), without correction of bias. m begins at 0, and v at tau^2, the least that the
algorithm allows. beta1, beta2 and tau have the paper's values; eta is to be tuned, as it was there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from semcons_ray.federation.algorithms.fedopt import FedOpt, Moments


@dataclass(frozen=True)
class FedAdam(FedOpt):
    """FedAvg-LoRA with Adam at the server.

    Attributes:
        server_learning_rate: eta, about the largest step of a weight in a round.
        beta1: The share of m that the next round keeps.
        beta2: The share of v that the next round keeps.
        tau: Size of changes below which steps shrink with them.
    """

    server_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3

    def step(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """Along m, each weight by its own measure."""
        mean, square = moments or (torch.zeros_like(change), torch.full_like(change, self.tau**2))
        mean = self.beta1 * mean + (1 - self.beta1) * change
        square = self.beta2 * square + (1 - self.beta2) * change**2
        return self.server_learning_rate * mean / (square.sqrt() + self.tau), (mean, square)
