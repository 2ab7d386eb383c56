"""Sentence embeddings: a unit vector for each text, which depends on that text alone.

Answers arrive in any order and repeat between clients and rounds, and a run may resume with an empty cache. So a
text's vector must not depend on what it was batched with: every batch has a fixed number of rows, and a padded
length that depends on the text only. Then each row is computed by the same kernels in the same order, whatever
the other rows hold. Models whose input is not just a text's ids from a tokenizer of transformers (static embeddings,
bags of words, a prompt before each text ...) are given texts one at a time.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from semcons_ray.errors import ModelError, first_line
from semcons_ray.modeling.device import enough_memory
from semcons_ray.modeling.packaged import resolve_model

logger = logging.getLogger(__name__)

SHORTEST_LENGTH = 16
LONGEST_LENGTH = 512
"""Tokens to which a text is cut for a model that does not say how many it takes."""

SAMPLES = ("", " A sample, of 2 sentences.  The other. ")
"""Texts on which a model is tried when it is loaded."""

MAX_CACHED = 20_000
"""Number of texts whose vectors are kept, those used last: 40 MB at 384 dimensions."""


class Embedder:
    """A sentence-embedding model with a cache by text.

    Args:
        name: See `resolve_model`.
        batch_size: Rows of every batch; a batch with fewer texts is padded.
        device: A torch device.

    Raises:
        ModelError: The model cannot be loaded, or its vectors are not finite.
    """

    def __init__(self, name: str, *, batch_size: int = 16, device: str = "cpu") -> None:
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._cache: dict[str, Tensor] = {}
        try:
            from sentence_transformers import SentenceTransformer  # takes seconds

            self.model = SentenceTransformer(resolve_model(name), device=device)
            self._prompt = self.model.prompts.get(self.model.default_prompt_name or "")
            longest = self.model.max_seq_length or LONGEST_LENGTH
            self._longest = LONGEST_LENGTH if math.isinf(longest) else int(longest)
            self._tokenizer = self._plain_tokenizer()
            tried = self._computed(SAMPLES)
            self._try_longest()
        except Exception as error:  # the library raises many kinds; all mean the same to the user
            raise ModelError(f"cannot load server.embedding_model {name}: {first_line(error)}") from error
        if not tried.isfinite().all():
            raise ModelError(f"server.embedding_model {name} gives vectors that are not finite; choose another")
        self._dimension = tried.shape[1]

    @property
    def dimension(self) -> int:
        """Length D of a vector."""
        return self._dimension

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
        with enough_memory(f"embed {self.batch_size} texts at a time", "lower server.embedding_batch_size"):
            vectors = self._computed(texts)
        is_finite = vectors.isfinite().all(dim=1)
        if not is_finite.all():
            lost = [text for text, finite in zip(texts, is_finite.tolist(), strict=True) if not finite]
            logger.warning("%d texts have no finite vector, and so are like no other: %r ...", len(lost), lost[0][:80])
        unit = torch.nn.functional.normalize(torch.where(is_finite[:, None], vectors, 0.0), dim=1)
        for text, vector in zip(texts, unit, strict=True):
            self._cache[text] = vector.clone()  # a view would keep its whole batch, padding rows and all

    def _computed(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts before they are normalised, (N, D) float32."""
        if self._tokenizer is None:
            return torch.cat([self._forward(self.model.preprocess([text], prompt=self._prompt)) for text in texts])
        lengths = [
            len(ids) for ids in self._tokenizer(list(texts), truncation=True, max_length=self._longest)["input_ids"]
        ]
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, length in enumerate(lengths):
            by_length[self._padded(length)].append(place)
        vectors: dict[int, Tensor] = {}
        for length, group in sorted(by_length.items()):
            for start in range(0, len(group), self.batch_size):
                places = group[start : start + self.batch_size]
                rows = [texts[place] for place in places]
                rows += [rows[-1]] * (self.batch_size - len(rows))
                features = self._tokenizer(
                    rows, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
                )
                vectors |= zip(places, self._forward(features), strict=False)
        return torch.stack([vectors[place] for place in range(len(texts))])

    @torch.no_grad()
    def _forward(self, features: Mapping[str, Any]) -> Tensor:
        moved = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in features.items()}
        vectors: Tensor = self.model(moved)["sentence_embedding"]
        return vectors.float()

    def _try_longest(self) -> None:
        """Let a model that says it takes more tokens than it has positions show that it can, as some can."""
        config = getattr(getattr(self.model[0], "auto_model", None), "config", None)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or positions >= self._longest:
            return
        try:
            self._forward(self.model.preprocess(["a " * self._longest], prompt=self._prompt))
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"it has {positions} positions and says that it takes {self._longest} tokens; lower max_seq_length "
                "in its sentence_bert_config.json"
            ) from error

    def _plain_tokenizer(self) -> Any:
        """The model's tokenizer, if the model's input is only what that makes of a text; else None."""
        tokenizer = getattr(self.model[0], "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.pad_token_id is None:
            return None
        for text in SAMPLES:
            taken = self.model.preprocess([text], prompt=self._prompt)
            made = tokenizer([text], truncation=True, max_length=self._longest, return_tensors="pt")
            if any(key not in taken or not torch.equal(taken[key], value) for key, value in made.items()):
                return None
        return tokenizer

    def _padded(self, length: int) -> int:
        padded = SHORTEST_LENGTH
        while padded < length:
            padded *= 2
        return min(padded, self._longest)
