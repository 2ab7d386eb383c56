"""What computing on a device asks for: the same bits every time, and a plain word where its memory does not suffice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from semcons_ray.errors import ModelError, first_line

# cuBLAS may choose another kernel for the same product while its workspace is one that streams share. It is read at the
# first product of a process, so it is set before there is one; a choice of the user's is kept.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SAYS_SO = ("DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED", "out of memory")
"""Parts of what torch says where memory does not suffice and the error is of no kind of its own."""


@contextmanager
def repeatable(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """While the block runs, operations on a GPU give the same bits each time.

    Left to themselves, the backward passes of fused attention add up in the order in which threads come. On the CPU
    nothing changes.

    Args:
        device: Where the block computes.
        wanted: Whether to do this.

    Raises:
        RuntimeError: An operation cannot; torch says which, and that it is not deterministic.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    # Warned only, attention would stay as it is. Nothing here reads what it has not written, so nothing is filled.
    mode, fills = torch.get_deterministic_debug_mode(), torch._C._get_deterministic_fill_uninitialized_memory()
    torch.set_deterministic_debug_mode("error")
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch._C._set_deterministic_fill_uninitialized_memory(fills)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of CPU tensors of one dtype; to a GPU they go as one, for which nothing waits."""
    if device.type != "cuda" or not tensors:
        return [tensor.detach().to(device, copy=True) for tensor in tensors]
    joined = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, pin_memory=True)
    torch.cat([tensor.detach().flatten() for tensor in tensors], out=joined)
    return _divided(joined.to(device, non_blocking=True), tensors)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors of one dtype and device; from a GPU they come as one."""
    if not tensors or not tensors[0].is_cuda:
        return [tensor.detach().cpu().clone() for tensor in tensors]
    joined = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    return [part.clone() for part in _divided(joined, tensors)]  # each with memory of its own, as files want it


def moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors by name on a device, all in one transfer; those that are there already are not copied."""
    there = [*tensors.values()]
    if there and there[0].device.type != device.type:
        there = to_host(there) if device.type == "cpu" else to_device(there, device)
    return dict(zip(tensors, there, strict=True))


def _divided(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(joined, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def running_sums(rows: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... values of each row of (B, V), the same bits each time.

    A GPU adds up a single row with all its threads, in an order that differs from time to time; of two rows, each in
    order.
    """
    if rows.is_cuda and len(rows) == 1:
        return rows.expand(2, -1).cumsum(dim=1)[:1]
    return rows.cumsum(dim=1)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in SAYS_SO)


@contextmanager
def enough_memory(work: str, remedy: str) -> Iterator[None]:
    """Say in one line what to change where the block runs out of memory, which no other try would mend.

    Args:
        work: What the memory is for, as in "not enough memory to ...".
        remedy: Which settings to change, and how.

    Raises:
        ModelError: Memory did not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = ". ".join(first_line(error).split(". ")[:3])  # further ones are about torch's allocator
        raise ModelError(f"not enough memory to {work}: {remedy} ({said})") from error
