"""How the processes that hold one model together find each other.

Apart from `sharded.py`, so that a process can join before it imports transformers, which takes seconds.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore


def open_rendezvous(host: str, num_ranks: int) -> tuple[Store, str]:
    """A store at a free port of this machine, through which ranks find each other, and its address."""
    store = TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def join_ranks(rank: int, num_ranks: int, address: str, store: Store | None) -> None:
    """Join the process group as one of `num_ranks` ranks.

    Args:
        rank: This process's rank, from 0.
        num_ranks: Number of ranks.
        address: Address of the store; see `open_rendezvous`.
        store: The store itself, on the rank that opened it; None on the others.
    """
    host, _, port = address.rpartition(":")
    os.environ["LOCAL_RANK"] = "0"  # a rank sees no device but its own
    store = store or TCPStore(host, int(port), num_ranks, is_master=False)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
