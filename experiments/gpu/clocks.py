"""Time and memory of work on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], object]) -> float:
    """Seconds until the device is done, and not only until the work is queued."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def empty_memory(device: str) -> None:
    """Give back what nothing uses any more, and begin to look for a peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gpu_bytes() -> tuple[int, int]:
    """The most GPU memory that this process took since `empty_memory`, and what of it is no tensor's: the context."""
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_reserved() + context, context
