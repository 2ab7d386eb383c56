"""How a model family generates token by token: whether batches may be padded, and with which cache.

Attention ignores what is masked, so texts of several lengths can be in one batch, padded on the left. Recurrent layers
(Mamba, gated delta nets, short convolutions) carry a state through everything they read, padding included, and families
without `position_ids` count positions themselves: their batches hold texts of one length, without padding or mask. A
few families have a cache of a kind of their own, or none; they read the whole text again for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from semcons_ray.config import GenerationConfig
from semcons_ray.modeling.device import running_sums

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
PADDED = {DynamicLayer, DynamicSlidingWindowLayer}
"""Kinds of cache layers that respect a mask."""


@dataclass(frozen=True)
class Decoding:
    """How a family's `forward` is called.

    Attributes:
        cache: Name of the argument for a `DynamicCache`; None: no cache is used.
        positions: Whether it takes `position_ids`.
        pads: Whether a batch may hold texts of several lengths, padded.
    """

    cache: str | None
    positions: bool
    pads: bool

    @classmethod
    def of(cls, base: Any) -> Decoding:
        """The way of a model of transformers."""
        taken = inspect.signature(type(base).forward).parameters
        positions = "position_ids" in taken
        cache = next((name for name in CACHE_ARGUMENTS if name in taken), None)
        if cache is None or not base._supports_default_dynamic_cache():
            return cls(None, positions, pads=False)
        kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
        if (base._is_stateful and kinds <= PADDED) or any(kind.__module__ != DynamicLayer.__module__ for kind in kinds):
            return cls(None, positions, pads=False)  # its state is kept in its modules, or in a cache of its own kind
        return cls(cache, positions, pads=kinds <= PADDED and positions)

    def batches(self, order: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
        """Batches of up to `size` texts that can be generated together, by index.

        Args:
            order: Indices of texts, sorted by length.
            lengths: Length of each text, in tokens.
            size: Most texts in a batch.
        """
        together = [list(order)] if self.pads else [list(same) for _, same in groupby(order, lambda i: lengths[i])]
        for texts in together:
            for start in range(0, len(texts), size):
                yield texts[start : start + size]

    def begin(self, config: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Growing:
        """Begin to generate after a batch of texts, (B, T), padded on the left where `attention_mask` (B, T) is 0."""
        cache = DynamicCache(config=config) if self.cache else None
        if attention_mask is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        else:
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return Growing(self, input_ids, attention_mask, positions, cache)


@dataclass
class Growing:
    """A batch of texts to which tokens are appended.

    Attributes:
        decoding: How the model is called.
        ids: Tokens that the model has not read yet, (B, T); without a cache, all tokens of the texts.
        mask: 0 for padding, else 1, (B, number of all tokens); None if there is no padding.
        positions: Positions of `ids` in their texts, (B, T).
        cache: The model's cache of what it has read, if it uses one.
    """

    decoding: Decoding
    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    cache: DynamicCache | None

    def inputs(self) -> dict[str, Any]:
        """The arguments of the next call of `forward`."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": self.cache is not None}
        if self.decoding.cache:
            inputs[self.decoding.cache] = self.cache
        if self.decoding.positions:
            inputs["position_ids"] = self.positions
        if self.mask is not None:
            inputs["attention_mask"] = self.mask
        return inputs

    def copy(self) -> Growing:
        """The same texts, to which other tokens can be appended."""
        return replace(self, cache=deepcopy(self.cache))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these, by index."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)  # unlike batch_select_indices, all kinds of layers have it
        self.ids, self.positions = self.ids[rows], self.positions[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def append(self, tokens: Tensor) -> None:
        """Append a token to each row; `tokens` is (B,)."""
        ids, positions = tokens[:, None], self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        if self.cache is None:
            ids, positions = torch.cat([self.ids, ids], dim=1), torch.cat([self.positions, positions], dim=1)
        self.ids, self.positions = ids, positions


def chosen_tokens(logits: Tensor, generation: GenerationConfig, draws: Tensor) -> Tensor:
    """A token for each row of `logits` (B, V): at temperature 0 the likeliest, else the one at the quantile `draws`
    (B,) of those that top_k and then top_p leave."""
    if generation.temperature == 0:
        return logits.argmax(dim=1)
    logits = logits / generation.temperature
    if generation.top_k:
        logits = TopKLogitsWarper(generation.top_k)(None, logits)
    if generation.top_p < 1:
        logits = TopPLogitsWarper(generation.top_p)(None, logits)
    # torch.multinomial would draw a number for each token of the vocabulary, which takes longer than the softmax.
    quantiles = running_sums(torch.softmax(logits, dim=1))
    last = quantiles[:, -1:]
    # A draw that rounds to 1 would lie behind all quantiles, and the last token may be one that was left out.
    below = last.nextafter(torch.zeros_like(last))
    wanted = torch.minimum(draws.to(quantiles)[:, None] * last, below)
    return torch.searchsorted(quantiles, wanted, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
