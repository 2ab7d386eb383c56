"""How a family of models takes a text that grows token by token: padded or not, and with which cache.

Attention leaves out what is masked, so texts of several lengths fill one batch, padded on the left. Recurrent layers
(Mamba, gated delta nets, short convolutions) carry a state through all that they are shown, and families without
`position_ids` count places themselves: their batches hold texts of one length, without padding or mask. A few families
keep what they computed in forms of their own, or keep nothing; they read the whole text again for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
PADDED = {DynamicLayer, DynamicSlidingWindowLayer}
"""Layers of a cache that a mask reaches."""


@dataclass(frozen=True)
class Decoding:
    """What a family's `forward` can be given.

    Attributes:
        cache: Name of the argument that takes a `DynamicCache`; None: it takes none.
        positions: Whether it takes `position_ids`.
        pads: Whether a batch may hold texts of several lengths.
    """

    cache: str | None
    positions: bool
    pads: bool

    @classmethod
    def of(cls, base: Any) -> Decoding:
        """That of a model of transformers."""
        taken = inspect.signature(type(base).forward).parameters
        positions = "position_ids" in taken
        cache = next((name for name in CACHE_ARGUMENTS if name in taken), None)
        if cache is None or not base._supports_default_dynamic_cache():
            return cls(None, positions, pads=False)
        kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
        if (base._is_stateful and kinds <= PADDED) or any(kind.__module__ != DynamicLayer.__module__ for kind in kinds):
            return cls(None, positions, pads=False)  # its state is in its modules, or in layers that keep rows apart
        return cls(cache, positions, pads=kinds <= PADDED and positions)

    def batches(self, order: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
        """Texts in `order`, which sorts them by length, in batches of up to `size` that can be worked on together."""
        together = [list(order)] if self.pads else [list(same) for _, same in groupby(order, lambda i: lengths[i])]
        for texts in together:
            for start in range(0, len(texts), size):
                yield texts[start : start + size]

    def begin(self, config: Any, ids: Tensor, mask: Tensor) -> Growing:
        """A batch of texts, (B, T), padded on the left where `mask` is 0."""
        cache = DynamicCache(config=config) if self.cache else None
        return Growing(self, ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)


@dataclass
class Growing:
    """A batch of texts that grow.

    Attributes:
        ids: What the model has yet to read, (B, T); without a cache, all of the texts.
        mask: 0 where padding is, (B, all tokens).
        positions: Of `ids`, in their texts.
        cache: What the model keeps of what it has read.
    """

    decoding: Decoding
    ids: Tensor
    mask: Tensor
    positions: Tensor
    cache: DynamicCache | None

    def inputs(self) -> dict[str, Any]:
        """What `forward` is given."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": self.cache is not None}
        if self.decoding.cache:
            inputs[self.decoding.cache] = self.cache
        if self.decoding.positions:
            inputs["position_ids"] = self.positions
        if self.decoding.pads:
            inputs["attention_mask"] = self.mask
        return inputs

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        kept = torch.tensor(rows, device=self.ids.device)
        if self.cache is not None:
            self.cache.reorder_cache(kept)  # unlike batch_select_indices, all kinds of layers have it
        self.ids, self.mask, self.positions = self.ids[kept], self.mask[kept], self.positions[kept]

    def append(self, tokens: Tensor) -> None:
        """One more token a row, (B,)."""
        ids, positions = tokens[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        if self.cache is None:
            ids, positions = torch.cat([self.ids, ids], dim=1), torch.cat([self.positions, positions], dim=1)
        self.ids, self.positions = ids, positions
