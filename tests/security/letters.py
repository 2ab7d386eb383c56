"""An embedder that counts letters, so that cosines can be computed by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor


def embed(texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts that have a letter, (N, 26)."""
    counts = [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
    return torch.nn.functional.normalize(torch.tensor(counts, dtype=torch.float32), dim=1)
