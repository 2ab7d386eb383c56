"""FFA-LoRA: A stays as it was drawn; clients train and exchange only B.

Source: Y. Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv:2403.12313. With the same A for
all clients, the mean of the products B_k A is exactly the mean of B_k times A, and about half of the bytes are saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import Shapes
from semcons_ray.modeling.adapter import Adapter

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client
    from semcons_ray.modeling.language_model import Adjust
    from semcons_ray.modeling.masters import Parameters


@dataclass(frozen=True)
class FfaLora(FedAvgLora):
    """FedAvg-LoRA in which A stays at its initial value, which every client draws from the same seed."""

    factors_only: ClassVar[bool] = True
    adjusts_gradients: ClassVar[bool] = True

    def adjust(self, client: Client) -> Adjust:
        """Drop the gradients of A."""

        def freeze(parameters: Parameters) -> None:
            for key, parameter in parameters.items():
                if "lora_A" in key:
                    parameter.grad = None

        return freeze

    def exchanged(self, shapes: Shapes) -> Shapes:
        """Shapes of B only."""
        return {key: shape for key, shape in shapes.items() if "lora_B" in key}

    def trained(self, client: Client) -> Adapter:
        """The client's B only."""
        return {key: value for key, value in client.adapter.items() if "lora_B" in key}
