"""SCAFFOLD on LoRA adapters: FedAvg whose clients correct their gradients for the differences between their data.

Source: S. P. Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
arXiv:1910.06378, algorithm 1 with a server step size of 1: client k adds c - c_k to every gradient, where c_k estimates
its own gradient and c the mean gradient of all clients. Afterwards x <- mean of y_k, and c <- c + |S|/N times the mean
change of c_k. Here x is the average adapter, y_k that of client k after training, |S| participants and N clients.

Where this departs from it: the paper's option II, c_k <- c_k - c + (x - y_k) / (K lr), equals the mean of the raw
gradients along the client's path if the optimizer is SGD. AdamW's steps are not gradients, so that mean is computed
directly. So clients may also differ in learning rate and number of steps (`clients.overrides`), which the paper's do
not: c_k stays a mean of gradients, whatever the steps made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import Shapes, pack, shapes_of, unpack, weighted_mean
from semcons_ray.messages import AdapterUpdate
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.device import moved

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client
    from semcons_ray.modeling.language_model import Adjust
    from semcons_ray.modeling.masters import Parameters

_CONTROL = "control."


@dataclass(frozen=True)
class Scaffold(FedAvgLora):
    """FedAvg-LoRA with control variates, which double the bytes.

    A client keeps c_k and c in `client.memory`, under keys that begin with "own." and "common.".
    """

    adjusts_gradients: ClassVar[bool] = True
    can_hear_late: ClassVar[bool] = False

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The next state: the unweighted mean of y_k, and c moved by the mean change of c_k."""
        mean = weighted_mean((unpack(update.tensors) for update in updates), [1.0] * len(updates))
        share = len(updates) / self.cohort.num_clients
        before = unpack(state)
        for key in [key for key in mean if key.startswith(_CONTROL)]:
            mean[key] = before.get(key, torch.zeros_like(mean[key])) + share * mean[key]
        return pack(mean, "float32")

    def exchanged(self, shapes: Shapes) -> Shapes:
        """Shapes of the adapter, and of a control variate of the same shapes."""
        return {**shapes, **{_CONTROL + key: shape for key, shape in shapes.items()}}

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Set the client's adapter to the average, and keep c."""
        client.adapter = client.fresh_adapter()
        sent = self.sent(round, downlink, self.exchanged(shapes_of(client.adapter)))
        for key, value in client.adapter.items():
            client.adapter[key] = sent.get(key, value)
            client.memory["common." + key] = sent.get(_CONTROL + key, torch.zeros_like(value))

    def adjust(self, client: Client) -> Adjust:
        """Add c - c_k to every gradient, and take the mean of the raw ones for the next c_k."""
        memory = client.memory
        zero = {key: torch.zeros_like(value) for key, value in client.adapter.items()}
        correction = {key: memory["common." + key] - memory.get("own." + key, zero[key]) for key in zero}
        mean, steps = zero, 0
        memory.update({"mean." + key: value for key, value in mean.items()})

        def correct(parameters: Parameters) -> None:
            nonlocal steps, mean, correction
            steps += 1
            if steps == 1:
                # Both stay where the parameters are until all steps are done: nothing waits for a GPU.
                device = next(iter(parameters.values())).device
                mean, correction = moved(mean, device), moved(correction, device)
                memory.update({"mean." + key: value for key, value in mean.items()})
            grads = {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}
            if grads:
                means = [mean[key] for key in grads]
                away = torch._foreach_sub([*grads.values()], means)
                torch._foreach_div_(away, steps)
                torch._foreach_add_(means, away)
                torch._foreach_add_([*grads.values()], [correction[key] for key in grads])

        return correct

    def trained(self, client: Client) -> Adapter:
        """The adapter, and the change of c_k."""
        memory = client.memory
        changes = {}
        mean = moved({key: memory.pop("mean." + key) for key in client.adapter}, torch.device("cpu"))
        for key, value in client.adapter.items():
            new = mean[key]
            changes[_CONTROL + key] = new - memory.get("own." + key, torch.zeros_like(value))
            memory["own." + key] = new
            del memory["common." + key]
        return {**client.adapter, **changes}
