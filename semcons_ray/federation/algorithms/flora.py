"""FLoRA: the server stacks adapters, so that their sum is exact, and clients begin each round with a new one.

Source: Z. Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv:2409.05976: A_k, weighted by private examples, are put below each other, and B_k side by side, so that the
product is the weighted sum of B_k A_k. Ranks may differ.

Where this departs from it: the paper merges the stack into the base weights. In bfloat16 most of a small update would
be rounded away there, so here the stack stays beside them, as a frozen adapter of rank R that grows each round; the
model is the same otherwise. A client that was left out of rounds is sent the stacks that it has missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.weights import mean_product, pack, stacked, unpack
from semcons_ray.messages import AdapterUpdate, GlobalAdapter

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client


@dataclass(frozen=True)
class Flora(FedAvgLora):
    """FedAvg-LoRA by stacking."""

    def aggregate(self, round: int, state: bytes, updates: Sequence[AdapterUpdate]) -> bytes:
        """The stacks so far and this round's, as they are sent."""
        adapters = [unpack(update.tensors) for update in updates]
        stack = mean_product(adapters, [update.num_examples for update in updates])
        return msgspec.msgpack.encode([*self._stacks(state), pack(stack, self.dtype)])

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The stacks of the rounds since the client was last visited."""
        stacks = [unpack(stack) for stack in self._stacks(state)]
        encoded: dict[int, bytes] = {len(stacks): b""}
        result = {}
        for client_id in client_ids:
            visited = [earlier for earlier in range(1, round) if client_id in self.cohort.sample(earlier)]
            # What the client was sent in round v were the stacks of rounds before v.
            known = max(visited, default=1) - 1
            if known not in encoded:
                missed = stacked(stacks[known:], [1.0] * (len(stacks) - known))
                message = GlobalAdapter(round_number=round - 1, tensors=pack(missed, self.dtype))
                encoded[known] = message.encode(self.compression)
            result[client_id] = encoded[known]
        return result

    def adopt(self, client: Client, round: int, downlink: bytes) -> None:
        """Put what was missed beside the base model, and begin a new adapter."""
        if downlink:
            sent = unpack(GlobalAdapter.decode(downlink).tensors)
            client.frozen = stacked([client.frozen, sent], [1.0, 1.0]) if client.frozen else sent
        client.adapter = client.fresh_adapter(round)

    def _stacks(self, state: bytes) -> list[bytes]:
        return msgspec.msgpack.decode(state, type=list[bytes]) if state else []
