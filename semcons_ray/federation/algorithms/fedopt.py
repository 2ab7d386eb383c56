"""FedOpt on LoRA adapters: FedAvg whose server takes the mean change of the clients' adapters for a gradient, and steps
with an optimizer of its own. Its subclasses are FedAvgM and FedAdam.

Source: S. J. Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295, algorithm 1: Delta_k = y_k - x, where x
is the adapter with which the clients began the round, and y_k that of client k after it; the server's optimizer steps
from x along Delta, the mean of Delta_k. Clients may train by any optimizer of their own.

Where this departs from it: clients send y_k, as in FedAvg, and the server subtracts x from their mean, which gives the
same Delta. The mean is FedAvg's, weighted by private examples. x is as clients have it, after it was rounded to
`algorithm.weight_dtype`, so that what nobody changes has a Delta of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
from torch import Tensor

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.fleet import RoundOutcome, Visitor
from semcons_ray.federation.server import ServerProtocol
from semcons_ray.federation.server_state import read_state
from semcons_ray.federation.weights import pack, unpack, with_rank
from semcons_ray.messages import AdapterUpdate

Moments = tuple[Tensor, ...]


class _State(msgspec.Struct):
    """The server's state.

    Attributes:
        adapter: x, packed.
        moments: What the optimizer remembers, each an adapter, packed; none before the first step.
    """

    adapter: bytes
    moments: list[bytes] = []


@dataclass(frozen=True)
class FedOpt(FedAvgLora, ABC):
    """FedAvg-LoRA with an optimizer at the server."""

    can_hear_late: ClassVar[bool] = False

    @abstractmethod
    def step(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """The optimizer, for one tensor.

        Args:
            change: Delta, minus the gradient.
            moments: What it returned in the round before; empty in the first.

        Returns:
            What is added to x, and what is remembered.
        """

    def run_round(
        self, round: int, state: bytes, fleet: Visitor, server: ServerProtocol, *, evaluate: bool
    ) -> RoundOutcome:
        """A round of `FedAvgLora.run_round`; in the first, x is the adapter from which all clients start."""
        if not state:
            state = msgspec.msgpack.encode(_State(pack(with_rank(fleet.first_adapter, self.ranks[0]), "float32")))
        return super().run_round(round, state, fleet, server, evaluate=evaluate)

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """x; in round 1 nothing, since clients have it."""
        return super().downlinks(round, _read(state).adapter if round > 1 else b"", client_ids)

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The next state: x after a step, and the optimizer's moments."""
        before = _read(state)
        start, moments = unpack(before.adapter), [unpack(moment) for moment in before.moments]
        mean = unpack(super().aggregate(b"", updates))
        adapter, after = {}, {}
        for key, value in mean.items():
            change = value - start[key]
            step, after[key] = self.step(change, tuple(moment[key] for moment in moments))
            adapter[key] = value + (step - change)  # x + step, and exactly the mean if the step is the whole change
        remembered = [dict(zip(after, tensors, strict=True)) for tensors in zip(*after.values(), strict=True)]
        return msgspec.msgpack.encode(_State(self.packed(adapter), [pack(each, "float32") for each in remembered]))


def _read(state: bytes) -> _State:
    return read_state(state, _State)
