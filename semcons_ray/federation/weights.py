"""Adapters as matrices: how the weight-averaging baselines pack, average, stack and truncate them.

The update of a module is `scaling` times B A (see `modeling.adapter`). All adapters of a run share one scaling, also
where ranks differ, so products B A of different clients can be added up.

Adapters that come in messages are checked twice: `unpack` refuses tensors that are not finite or not of a type that
`pack` writes, and `check_shapes` refuses any other set of tensors than the receiver expects.

Legend: r rank, R sum of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from semcons_ray.errors import MessageError, NotFiniteError
from semcons_ray.modeling.adapter import Adapter

Shapes = Mapping[str, tuple[int, ...]]

WIRE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADER_BYTES = 1024
"""Most bytes that a tensor takes in a packed adapter besides its values: for its key, type, shape and offsets."""


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
    # All together first: the largest size is finite where all are.
    floats = [value for value in tensors.values() if value.is_floating_point() and value.numel()]
    if math.isfinite(torch.nn.utils.get_total_norm(floats, torch.inf, foreach=True)):
        return ""
    return next((key for key, value in tensors.items() if not bool(torch.isfinite(value).all())), "")


def unpack(data: bytes) -> Adapter:
    """The tensors that `pack` packed, as float32; an empty dict for empty bytes.

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
    """Shapes of the same modules' A (r, in) and B (out, r) at another rank; others are as they were."""
    return {
        key: (rank, shape[1]) if "lora_A" in key else (shape[0], rank) if "lora_B" in key else shape
        for key, shape in shapes.items()
    }


def check_shapes(adapter: Adapter, expected: Shapes) -> None:
    """Check that an adapter holds the expected tensors and no others.

    Raises:
        MessageError: It does not; the message names the first that differs.
    """
    found = shapes_of(adapter)
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            told, wanted = (str(shapes[key]) if key in shapes else "missing" for shapes in (found, expected))
            raise MessageError(f"tensors: {key:.200} is {told}, not {wanted}")


def packed_bytes(shapes: Shapes) -> int:
    """Most bytes that `pack` makes of tensors of these shapes."""
    return HEADER_BYTES + sum(HEADER_BYTES + 4 * math.prod(shape) for shape in shapes.values())


def weighted_mean(adapters: Iterable[Adapter], weights: Sequence[float]) -> Adapter:
    """The mean of each tensor over adapters, weighted by w_k / sum(w); accumulated in float64, in the order given.

    Each adapter is added before the next is asked for, so an iterator that unpacks them needs room for one.
    """
    total = math.fsum(weights)
    sums: Adapter = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        sums = sums or {key: torch.zeros_like(value, dtype=torch.float64) for key, value in adapter.items()}
        for key, value in sums.items():
            value += adapter[key].double() * (weight / total)
    return {key: value.float() for key, value in sums.items()}


def factors(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Keys of A and B of each adapted module."""
    return ((key, key.replace("lora_A", "lora_B")) for key in adapter if "lora_A" in key)


def rank_of(adapter: Adapter) -> int:
    """Rank r of an adapter, taken from its first A; 0 where it has none."""
    return next((value.shape[0] for key, value in adapter.items() if "lora_A" in key and value.dim() == 2), 0)


def with_rank(adapter: Adapter, rank: int) -> Adapter:
    """The adapter at another rank: truncated to its first `rank` components, or padded with zeros, which keeps B A.

    Tensors that are no factors, such as DoRA's sizes, stay as they are.
    """
    result = dict(adapter)
    for a, b in factors(adapter):
        kept = min(rank, adapter[a].shape[0])
        result[a] = adapter[a].new_zeros(rank, adapter[a].shape[1])
        result[b] = adapter[b].new_zeros(adapter[b].shape[0], rank)
        result[a][:kept] = adapter[a][:kept]
        result[b][:, :kept] = adapter[b][:, :kept]
    return result


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter of rank R whose product B A is exactly the sum of w_k B_k A_k: w_k A_k stacked by rows, B_k by
    columns."""
    result = {}
    for a, b in factors(adapters[0]):
        result[a] = torch.cat([w * adapter[a] for adapter, w in zip(adapters, weights, strict=True)])
        result[b] = torch.cat([adapter[b] for adapter in adapters], dim=1)
    return result


def mean_product(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The stack whose product B A is the mean of the products B_k A_k, weighted by w_k / sum(w)."""
    total = math.fsum(weights)
    return stacked(adapters, [w / total for w in weights])


def truncated_svd(adapter: Adapter, rank: int) -> Adapter:
    """The adapter of `rank` whose product is nearest to B A in Frobenius norm: B = U S and A = V^T of its SVD.

    Only the (R, R) core between QR factors is decomposed, so no (out, in) matrix is made. Components are in descending
    order of their singular values, so the first r' of them are the best adapter of rank r'.
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
    """Frobenius norm of the products B A of all modules together, by |B A|^2 = <B^T B, A A^T>, from (r, r) matrices."""
    squared = 0.0
    for a, b in factors(adapter):
        squared += float(((adapter[b].T @ adapter[b]).double() * (adapter[a] @ adapter[a].T).double()).sum())
    return math.sqrt(max(squared, 0.0))
