"""Sentence embeddings: a unit vector a text, each a pure function of its text alone.

Answers arrive in any order and repeat between clients and rounds, and a run may resume with an empty cache. So a
text's vector must not depend on what it was batched with: every batch has a fixed number of rows, and a padded
length that depends on the text only. Then each row is computed by the same kernels in the same order, whatever
the other rows hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from semcons_ray.errors import ModelError, first_line

SHORTEST_LENGTH = 16
MAX_CACHED = 20_000
"""Texts whose vectors are kept, the last used ones: 40 MB of them at 384 dimensions."""


class Embedder:
    """A sentence-embedding model with a cache by text.

    Args:
        name: What `resolve_model` returned: a folder or a hub id.
        batch_size: Rows of every batch; a part-filled one is padded.
        device: A torch device.

    Raises:
        ModelError: The model cannot be loaded.
    """

    def __init__(self, name: str, *, batch_size: int = 16, device: str = "cpu") -> None:
        try:
            self.model = SentenceTransformer(name, device=device)
        except Exception as error:  # the library raises many kinds; all mean the same to the user
            raise ModelError(f"cannot load server.embedding_model {name}: {first_line(error)}") from error
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._tokenizer: Any = self.model.tokenizer
        self._longest = int(self.model.max_seq_length or 512)
        self._cache: dict[str, Tensor] = {}

    @property
    def dimension(self) -> int:
        """Length D of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of `texts`, (N, D) float32 on the embedder's device; equal texts give equal rows."""
        self._compute(sorted({text for text in texts if text not in self._cache}))
        if not texts:
            return torch.zeros(0, self.dimension, device=self.device)
        vectors = torch.stack([self._cache[text] for text in texts])
        for text in dict.fromkeys(texts):
            self._cache[text] = self._cache.pop(text)  # to the end of the line
        while len(self._cache) > MAX_CACHED:
            del self._cache[next(iter(self._cache))]
        return vectors

    def _compute(self, texts: Sequence[str]) -> None:
        if not texts:
            return
        lengths = [
            len(ids) for ids in self._tokenizer(list(texts), truncation=True, max_length=self._longest)["input_ids"]
        ]
        by_length: dict[int, list[str]] = defaultdict(list)
        for text, length in zip(texts, lengths, strict=True):
            by_length[self._padded(length)].append(text)
        for length, group in sorted(by_length.items()):
            for start in range(0, len(group), self.batch_size):
                rows = group[start : start + self.batch_size]
                for text, vector in zip(rows, self._forward(rows, length), strict=False):
                    self._cache[text] = vector.clone()  # a view would keep its whole batch, padding rows and all

    def _forward(self, rows: list[str], length: int) -> Tensor:
        filled = rows + [rows[-1]] * (self.batch_size - len(rows))
        features = self._tokenizer(
            filled, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        vectors = self.model(dict(features))["sentence_embedding"].float()
        return torch.nn.functional.normalize(vectors, dim=1)

    def _padded(self, length: int) -> int:
        padded = SHORTEST_LENGTH
        while padded < length:
            padded *= 2
        return min(padded, self._longest)
