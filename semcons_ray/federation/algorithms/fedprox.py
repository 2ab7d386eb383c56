"""FedProx on LoRA adapters: FedAvg whose clients are held near the average with which they began the round.

Source: T. Li et al., "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127, equation 2: each client
minimises F_k(w) + mu/2 |w - w_t|^2, where w_t is the average. Here w is the adapter's A and B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.modeling.device import moved

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client
    from semcons_ray.modeling.language_model import Adjust
    from semcons_ray.modeling.masters import Parameters


@dataclass(frozen=True)
class FedProx(FedAvgLora):
    """FedAvg-LoRA with a proximal term.

    Attributes:
        mu: Weight of the proximal term in the loss.
    """

    adjusts_gradients: ClassVar[bool] = True

    mu: float = 0.01

    def adjust(self, client: Client) -> Adjust:
        """Add the gradient of the proximal term, mu (w - w_t)."""
        start = {key: value.clone() for key, value in client.adapter.items()}

        def pull_back(parameters: Parameters) -> None:
            nonlocal start
            device = next(iter(parameters.values())).device
            start = moved(start, device)  # stays there for the steps to come
            grads = {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}
            if grads:
                away = torch._foreach_sub([parameters[key] for key in grads], [start[key] for key in grads])
                torch._foreach_mul_(away, self.mu)
                torch._foreach_add_([*grads.values()], away)

        return pull_back
