"""FLoRA: the server stacks adapters, which aggregates them exactly, and clients begin each round with a new adapter.

Source: Z. Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv:2409.05976: A_k, weighted by private examples, are stacked by rows, and B_k by columns, so that the product of the
stacks is the weighted sum of B_k A_k. Ranks may differ.

Where this departs from it: the paper merges the stack into the base weights. In bfloat16 most of a small update would
be rounded away there, so here the stack stays beside the base weights, as a frozen adapter whose rank grows each round;
otherwise the model is the same. A client that missed rounds, or was lost in them, is sent the stacks that it lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import msgspec
import torch

from semcons_ray.errors import MessageError
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.server_state import read_state
from semcons_ray.federation.weights import check_shapes, mean_product, rank_of, shapes_at, shapes_of, stacked, unpack
from semcons_ray.messages import AdapterUpdate, GlobalAdapter, decode_downlink
from semcons_ray.modeling.adapter import Adapter

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client


class _State(msgspec.Struct):
    """The server's state.

    Attributes:
        stacks: The packed stack of each round done.
        held: By client, how many of them it had when it last answered. A client that was sampled and then lost may not
            have got what it was sent.
        average: A packed adapter that all clients are sent besides; empty for FLoRA itself.
    """

    stacks: list[bytes] = []
    held: dict[int, int] = {}
    average: bytes = b""


@dataclass(frozen=True)
class Flora(FedAvgLora):
    """FedAvg-LoRA by stacking.

    A client keeps in `client.memory`, under "stacks", the number of stacks that it has put beside its base model.
    """

    factors_only: ClassVar[bool] = True
    any_ranks: ClassVar[bool] = True
    outgrows_ranks: ClassVar[bool] = True
    can_hear_late: ClassVar[bool] = False

    def aggregate(self, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The next state: this round's stack is added, and clients that answered are noted to have all earlier ones."""
        before = _read(state)
        adapters, weights = [unpack(update.tensors) for update in updates], [update.num_examples for update in updates]
        new = [self.packed(stack) for stack in self.stacks(adapters, weights)]
        held = before.held | {update.client_id: len(before.stacks) for update in updates}
        return msgspec.msgpack.encode(_State([*before.stacks, *new], held, self.average(adapters, weights)))

    def stacks(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Adapter]:
        """What a round adds to the frozen adapter: here all that clients have learnt."""
        return [mean_product(adapters, weights)]

    def average(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> bytes:
        """The packed adapter with which all clients go on: here none."""
        return b""

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The stacks that each client is not known to have; a tensor's key begins with the number of its stack."""
        known = _read(state)
        encoded: dict[int, bytes] = {}
        result = {}
        for client_id in client_ids:
            held = known.held.get(client_id, 0)
            if held not in encoded:
                tensors = unpack(known.average)
                for number, stack in enumerate(known.stacks[held:], start=held):
                    tensors |= {f"{number}.{key}": tensor for key, tensor in unpack(stack).items()}
                message = GlobalAdapter(round_number=round - 1, tensors=self.packed(tensors))
                encoded[held] = message.encode(self.compression) if tensors else b""
            result[client_id] = encoded[held]
        return result

    def received_rank(self, rank: int, missed: Sequence[Sequence[int]]) -> int:
        """The sum of the ranks of all stacks that the client lacks."""
        return sum(map(sum, missed))

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Put what was missed beside the base model, and begin a new adapter."""
        self.keep(client, self.received_tensors(round, downlink))
        client.adapter = client.fresh_adapter(round)

    def received_tensors(self, round: int, downlink: bytes) -> Adapter:
        """The tensors of an encoded `GlobalAdapter`, of whatever shapes; none if it is empty."""
        return unpack(decode_downlink(GlobalAdapter, downlink, round=round).tensors) if downlink else {}

    def keep(self, client: Client, tensors: Adapter) -> None:
        """Put stacks beside the base model, each once.

        Raises:
            MessageError: They do not follow on those that the client has, or are not of its modules.
        """
        stacks = self._numbered(client, tensors)
        held = int(client.memory.get("stacks", torch.zeros(1)))
        if min(stacks, default=held) > held:
            raise MessageError(f"tensors: stacks from number {min(stacks)} on, but the client has only {held}")
        # One whose answer was lost on the way has more than the server knows of.
        new = [stacks[number] for number in sorted(stacks) if number >= held]
        if new:
            parts = [client.frozen, *new] if client.frozen else new
            client.frozen = stacked(parts, [1.0] * len(parts))
            client.memory["stacks"] = torch.tensor([max(stacks) + 1])

    def _numbered(self, client: Client, tensors: Adapter) -> dict[int, Adapter]:
        """Stacks by their numbers, which follow each other."""
        stacks: dict[int, Adapter] = {}
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            if not re.fullmatch("[0-9]{1,9}", number):
                raise MessageError(f"tensors: {name:.200} has no number of a stack")
            stacks.setdefault(int(number), {})[key] = tensor
        if sorted(stacks) != [*range(min(stacks, default=0), min(stacks, default=0) + len(stacks))]:
            raise MessageError(f"tensors: stacks {sorted(stacks)} do not follow each other")
        own = shapes_of(client.adapter)
        for stack in stacks.values():
            check_shapes(stack, shapes_at(own, max(rank_of(stack), 1)))
        return stacks


def _read(state: bytes) -> _State:
    return read_state(state, _State) if state else _State()
