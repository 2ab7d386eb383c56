"""Adapters as matrices: how the weight baselines pack, average, stack and cut them.

The update of a module is `scaling` times B A (see `modeling.adapter`). All adapters here share one scaling, also where
ranks differ, so that sums of products mean what they say.

Adapters that come in messages are checked twice: `unpack` refuses what is no finite tensor of a type that `pack` takes,
and `check_shapes` what is not the tensors that the receiver expects.

Legend: r rank, R sum of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from semcons_ray.errors import MessageError, NotFiniteError
from semcons_ray.modeling.adapter import Adapter

Shapes = Mapping[str, tuple[int, ...]]

WIRE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADER_BYTES = 1024
"""What a tensor takes at most in a packed adapter beside its values: its key, type, shape and place."""


def pack(tensors: Adapter, dtype: str) -> bytes:
    """The tensors as safetensors, in `dtype`: "float32", "float16" or "bfloat16".

    Raises:
        NotFiniteError: A number is not finite, or too large for `dtype`.
    """
    packed = {key: value.to(getattr(torch, dtype)).contiguous() for key, value in tensors.items()}
    if bad := non_finite(packed):
        remedy = "training.learning_rate is probably too high"
        if not non_finite(tensors):
            remedy = f"it is too large for {dtype}: set algorithm.weight_dtype to bfloat16 or float32"
        raise NotFiniteError(f"{bad} is not finite; {remedy}")
    return save(packed)


def non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of the first tensor that holds infinity or NaN; empty if none does."""
    return next((key for key, value in tensors.items() if not bool(torch.isfinite(value).all())), "")


def unpack(data: bytes) -> Adapter:
    """What `pack` packed, as float32; nothing for no bytes.

    Raises:
        MessageError: The bytes are not safetensors of such tensors, or a value is not finite.
    """
    try:
        tensors = load(data) if data else {}
    except (SafetensorError, KeyError) as error:  # the latter for types that torch does not have
        raise MessageError(f"tensors: {error}") from error
    for key, value in tensors.items():
        if value.dtype not in WIRE_DTYPES:
            raise MessageError(f"tensors: {key} is {value.dtype}")
    if bad := non_finite(tensors):
        raise MessageError(f"tensors: {bad} is not finite")
    return {key: value.float() for key, value in tensors.items()}


def shapes_of(adapter: Adapter) -> Shapes:
    """Shape of each tensor."""
    return {key: tuple(value.shape) for key, value in adapter.items()}


def shapes_at(shapes: Shapes, rank: int) -> Shapes:
    """Those of the same modules' A (r, in) and B (out, r) at another rank."""
    return {key: (rank, shape[1]) if "lora_A" in key else (shape[0], rank) for key, shape in shapes.items()}


def check_shapes(adapter: Adapter, expected: Shapes) -> None:
    """Make sure that an adapter holds the tensors expected, and no others.

    Raises:
        MessageError: It does not; names the first that differs.
    """
    found = shapes_of(adapter)
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            told, wanted = (str(shapes[key]) if key in shapes else "missing" for shapes in (found, expected))
            raise MessageError(f"tensors: {key:.200} is {told}, not {wanted}")


def packed_bytes(shapes: Shapes) -> int:
    """Most bytes that `pack` makes of tensors of these shapes."""
    return HEADER_BYTES + sum(HEADER_BYTES + 4 * math.prod(shape) for shape in shapes.values())


def weighted_mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Sum of w_k / sum(w) times each tensor; accumulated in float64, in the order given."""
    total = math.fsum(weights)
    return {
        key: torch.stack([adapter[key].double() * (w / total) for adapter, w in zip(adapters, weights, strict=True)])
        .sum(dim=0)
        .float()
        for key in adapters[0]
    }


def factors(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Keys of A and B of each adapted module."""
    return ((key, key.replace("lora_A", "lora_B")) for key in adapter if "lora_A" in key)


def rank_of(adapter: Adapter) -> int:
    """r, taken from the first A; 0 where there is no such matrix."""
    return next((value.shape[0] for key, value in adapter.items() if "lora_A" in key and value.dim() == 2), 0)


def with_rank(adapter: Adapter, rank: int) -> Adapter:
    """The adapter with its first `rank` components: cut, or padded with zeros, which leave B A as it is."""
    result = {}
    for a, b in factors(adapter):
        kept = min(rank, adapter[a].shape[0])
        result[a] = adapter[a].new_zeros(rank, adapter[a].shape[1])
        result[b] = adapter[b].new_zeros(adapter[b].shape[0], rank)
        result[a][:kept] = adapter[a][:kept]
        result[b][:, :kept] = adapter[b][:, :kept]
    return result


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter of rank R whose product is the weighted sum of products, exactly: [w_k A_k] below each other, [B_k]
    side by side."""
    result = {}
    for a, b in factors(adapters[0]):
        result[a] = torch.cat([w * adapter[a] for adapter, w in zip(adapters, weights, strict=True)])
        result[b] = torch.cat([adapter[b] for adapter in adapters], dim=1)
    return result


def mean_product(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The stack whose product is the mean of products, weighted by w_k / sum(w)."""
    total = math.fsum(weights)
    return stacked(adapters, [w / total for w in weights])


def truncated_svd(adapter: Adapter, rank: int) -> Adapter:
    """The best adapter of `rank` for the same product, in Frobenius norm: B = U S and A = V^T of the SVD.

    The SVD is that of an (R, R) core between QR factors, so no (out, in) matrix is made. Components come in descending
    order of their singular values: the first r' of them are the best of rank r'.
    """
    result = {}
    for a, b in factors(adapter):
        q_b, r_b = torch.linalg.qr(adapter[b].double())
        q_a, r_a = torch.linalg.qr(adapter[a].double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        cut = {a: (vh @ q_a.T)[:rank].float(), b: (q_b @ (u * s))[:, :rank].float()}
        result.update(with_rank(cut, rank))
    return result


def update_norm(adapter: Adapter) -> float:
    """Frobenius norm of all the products B A together, from r by r matrices: |B A|^2 = <B^T B, A A^T>."""
    squared = 0.0
    for a, b in factors(adapter):
        squared += float(((adapter[b].T @ adapter[b]).double() * (adapter[a] @ adapter[a].T).double()).sum())
    return math.sqrt(max(squared, 0.0))
