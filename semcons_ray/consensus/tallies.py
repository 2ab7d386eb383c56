"""What a medoid is elected by: the length of each vector, and its product with the sum of all to its prompt.

Legend: C answers to a prompt, P prompts, D embedding dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from semcons_ray.consensus import rules


def tallies(embeddings: Tensor, mask: Tensor, chunks: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Lengths of the vectors, and their products with the sum over answers, each (P, C) float32.

    Args:
        embeddings: Vectors, (P, C, D); rows of missing answers count as zero.
        mask: Which answers are there, (P, C) bool, on the same device.
        chunks: Prompts to take together, where torch's operations do this.
    """
    plain = embeddings.dtype == torch.float32 and embeddings.is_contiguous()
    if embeddings.is_cuda and plain and importlib.util.find_spec("triton"):
        from semcons_ray.consensus import kernel

        return kernel.tallies(embeddings, mask)
    norms = torch.empty(embeddings.shape[:2], device=embeddings.device)
    to_all = torch.empty_like(norms)
    for here in chunks:
        vectors = present_vectors(embeddings[here], mask[here])
        # The norms first: row after row is how a chunk comes into the cache fastest.
        norms[here] = torch.linalg.vector_norm(vectors, dim=2)
        to_all[here] = rules.products(vectors.sum(dim=1, keepdim=True), vectors)
    return norms, to_all


def nearness(embeddings: Tensor, mask: Tensor, votes: Tensor, chunks: Sequence[slice]) -> Tensor:
    """Products of the vectors with the sum of all votes to their prompt, (P, C) float32, where `votes` is (P, C), and 0
    at least where `mask` is false."""
    found = torch.empty(mask.shape, device=mask.device)
    for here in chunks:
        vectors = present_vectors(embeddings[here], mask[here])
        found[here] = rules.products(torch.bmm(votes[here, None, :], vectors), vectors)
    return found


def shared_tallies(
    embeddings: Tensor, mask: Tensor, voters: Tensor, shares: Tensor, chunks: Sequence[slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """Where clients have several answers: lengths of the vectors, and their products with the sum of all clients' votes
    and with their own client's vote, each (P, C) float32."""
    norms, to_all, to_own = (torch.empty(mask.shape, device=mask.device) for _ in range(3))
    for here in chunks:
        vectors = present_vectors(embeddings[here], mask[here])
        norms[here] = torch.linalg.vector_norm(vectors, dim=2)
        votes = shares[here, :, None] * vectors
        to_all[here] = rules.products(votes.sum(dim=1, keepdim=True), vectors)
        centres = torch.zeros_like(votes).index_add_(1, voters, votes)
        to_own[here] = (centres[:, voters] * vectors).sum(dim=2)
    return norms, to_all, to_own


def present_vectors(embeddings: Tensor, present: Tensor) -> Tensor:
    """The embeddings in float32 with zeros for missing answers; not copied if there is nothing to change."""
    vectors = embeddings.to(torch.float32)
    return vectors if bool(present.all()) else vectors.where(present[:, :, None], 0.0)
