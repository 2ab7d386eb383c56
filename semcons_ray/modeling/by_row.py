"""Adapters of several clients in one model: each row of a batch goes through its own client's.

As in S-LoRA (Y. Sheng et al., arXiv:2311.03285) and mLoRA (Z. Ye et al., arXiv:2312.02515), the base model computes
all rows at once, and each client's update is added to its own rows. No row reads another, so each client's gradients
are its own. What is not finite in a row stays there as well, but with kernels that multiply what lies behind a row by 0
instead of leaving it out, as those for bfloat16 on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    """The rows of a batch that are one client's.

    Attributes:
        adapter: Tensors of its adapter, by the names that they have in the model; of any rank.
        frozen: Those of one that is added and not trained, whose A is scaled already; empty: there is none.
        tokens: How many tokens its rows have together, padding included.
    """

    adapter: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    tokens: int


@contextmanager
def adapters_by_row(model: Any, names: Sequence[str], scaling: float, shares: Sequence[Share]) -> Iterator[None]:
    """While the block runs, layers with an adapter add to each row the update of its client, and not their own.

    Args:
        model: A model of PEFT.
        names: Names of its adapter's tensors.
        scaling: What the product B A is multiplied by.
        shares: Whose the rows of a batch are, in their order; it is changed in place before each batch.
    """
    layers = {path: model.get_submodule(path) for path in (name[: name.index(".lora_A")] for name in _downs(names))}
    before = {path: layer.__dict__.get("forward") for path, layer in layers.items()}
    for name, (path, layer) in zip(_downs(names), layers.items(), strict=True):
        layer.forward = _forward(path, name, layer.base_layer, scaling, shares)
    try:
        yield
    finally:
        for path, layer in layers.items():
            del layer.forward
            if (own := before[path]) is not None:
                layer.forward = own


def _downs(names: Sequence[str]) -> list[str]:
    return [name for name in names if "lora_A" in name]


def _forward(path: str, down: str, base: Any, scaling: float, shares: Sequence[Share]) -> Callable[..., Tensor]:
    up = down.replace("lora_A", "lora_B")

    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        result: Tensor = base(x, *more, **named)
        sizes = [share.tokens for share in shares]
        read, given = x.flatten(0, -2), result.flatten(0, -2)
        if len(read) != sum(sizes):  # an expert, or an output embedding that is given the responses alone
            raise ValueError(f"{path} reads {len(read)} vectors where the batch has {sum(sizes)} tokens")
        parts = []
        for share, mine, plain in zip(shares, torch.split(read, sizes), torch.split(given, sizes), strict=True):
            whole = _added(plain, mine, share.adapter[down], share.adapter[up], scaling)
            if share.frozen:
                whole = _added(whole, mine, share.frozen[down], share.frozen[up], 1.0)
            parts.append(whole)
        return torch.cat(parts).view_as(result)

    return forward


def _added(plain: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """`plain` (N, outputs) and what an adapter adds to it for `x` (N, inputs), in the dtype of `plain`."""
    return torch.addmm(plain.to(up.dtype), x.to(down.dtype) @ down.T, up.T, alpha=scaling).to(plain.dtype)
