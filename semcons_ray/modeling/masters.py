"""Float32 master weights of an adapter that is trained, and how they and the weights that compute hand over.

All tensors are taken together, so that a GPU gets a few kernels and not a few for each of hundreds of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.device import to_device, to_host

Parameters = Mapping[str, torch.nn.Parameter]


class Masters:
    """Master weights, and gradients in float32.

    Args:
        adapter: Their first values, which are copied.
        computing: The weights in the model, in its dtype; those of an adapter of lower rank are the first of theirs.

    Attributes:
        parameters: The master weights, in the order of `computing`.
    """

    def __init__(self, adapter: Adapter, computing: Parameters) -> None:
        device = next(iter(computing.values())).device
        values = to_device([adapter[key] for key in computing], device)
        self.parameters = {key: torch.nn.Parameter(value) for key, value in zip(computing, values, strict=True)}
        self._computing = computing
        self._room = {key: torch.empty_like(value) for key, value in self.parameters.items()}

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Begin a step: no master weight has a gradient."""
        for master in self.parameters.values():
            master.grad = None

    @torch.no_grad()
    def take_gradients(self, factor: float) -> None:
        """Add the gradients of the weights that compute, divided by `factor`, and leave those without any."""
        given = {
            key: part(value.grad, self.parameters[key])
            for key, value in self._computing.items()
            if value.grad is not None
        }
        if not given:
            return
        before = {key: grad for key in given if (grad := self.parameters[key].grad) is not None}
        rooms = {key: self._room[key] for key in given}
        taken = {key: torch.empty_like(room) if key in before else room for key, room in rooms.items()}
        torch._foreach_copy_([*taken.values()], [*given.values()])
        if factor != 1:
            torch._foreach_div_([*taken.values()], factor)
        if before:
            torch._foreach_add_([*before.values()], [taken[key] for key in before])
        for key in given:
            if key not in before:
                self.parameters[key].grad = taken[key]
            self._computing[key].grad = None

    def hand_over(self) -> None:
        """Round the master weights into those that compute."""
        load(self._computing, [*self.parameters.values()])

    def to_adapter(self) -> Adapter:
        """The master weights on the CPU."""
        return dict(zip(self.parameters, to_host([*self.parameters.values()]), strict=True))


@torch.no_grad()
def load(computing: Parameters, values: list[Tensor]) -> None:
    """Copy values, on the same device, into the weights that compute; those of a lower rank are padded with zeros."""
    for to, value in zip(computing.values(), values, strict=True):
        if to.shape != value.shape:
            to.zero_()
    places = [part(to, value) for to, value in zip(computing.values(), values, strict=True)]
    if places:  # a model may be held without an adapter
        torch._foreach_copy_(places, values)


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of the first rows and columns of `tensor`, as many as `like` has: the place of an adapter of lower
    rank."""
    return tensor if tensor.shape == like.shape else tensor[tuple(slice(size) for size in like.shape)]
