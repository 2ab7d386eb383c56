"""The shapes of models that have a name here, so that sizes can be computed without a file or a network."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """The shape of a model with gated feed-forward layers, from its published config.json.

    Attributes:
        layers: Number of layers.
        hidden: Width of a hidden vector.
        queries: Width of the queries: heads times head size, which is not always `hidden`.
        keys: Width of the keys, and of the values.
        feed_forward: Inner width of a feed-forward layer.
        vocabulary: Number of tokens.
        embeddings: 1 if input and output embedding are the same matrix, else 2.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    feed_forward: int
    vocabulary: int
    embeddings: int

    @property
    def parameters(self) -> int:
        """Number of parameters in matrices; norms and biases, less than 0.1%, are left out."""
        attention = 2 * (self.queries + self.keys)
        return self.hidden * (self.layers * (attention + 3 * self.feed_forward) + self.embeddings * self.vocabulary)

    @property
    def linear_maps(self) -> dict[str, int]:
        """Sum of d_in + d_out over the layers, by name of the linear map."""
        widths = {"q": self.queries, "k": self.keys, "v": self.keys, "o": self.queries}
        widths |= dict.fromkeys(("gate", "up", "down"), self.feed_forward)
        return {f"{name}_proj": self.layers * (self.hidden + width) for name, width in widths.items()}


SHAPES = {
    "llama-3.1-8b": Shape(32, 4096, 4096, 1024, 14336, 128256, 2),
    "llama-3.1-70b": Shape(80, 8192, 8192, 1024, 28672, 128256, 2),
    "llama-3.1-405b": Shape(126, 16384, 16384, 1024, 53248, 128256, 2),
    "llama-3.2-1b": Shape(16, 2048, 2048, 512, 8192, 128256, 1),
    "llama-3.2-3b": Shape(28, 3072, 3072, 1024, 8192, 128256, 1),
    "qwen2.5-0.5b": Shape(24, 896, 896, 128, 4864, 151936, 1),
    "qwen2.5-1.5b": Shape(28, 1536, 1536, 256, 8960, 151936, 1),
    "qwen2.5-3b": Shape(36, 2048, 2048, 256, 11008, 151936, 1),
    "qwen2.5-7b": Shape(28, 3584, 3584, 512, 18944, 152064, 2),
    "qwen2.5-14b": Shape(48, 5120, 5120, 1024, 13824, 152064, 2),
    "qwen2.5-32b": Shape(64, 5120, 5120, 1024, 27648, 152064, 2),
    "qwen2.5-72b": Shape(80, 8192, 8192, 1024, 29568, 152064, 2),
    "qwen3-0.6b": Shape(28, 1024, 2048, 1024, 3072, 151936, 1),
    "qwen3-1.7b": Shape(28, 2048, 2048, 1024, 6144, 151936, 1),
    "qwen3-4b": Shape(36, 2560, 4096, 1024, 9728, 151936, 1),
    "qwen3-8b": Shape(36, 4096, 4096, 1024, 12288, 151936, 2),
    "qwen3-14b": Shape(40, 5120, 5120, 1024, 17408, 151936, 2),
    "qwen3-32b": Shape(64, 5120, 8192, 1024, 25600, 151936, 2),
    "gemma-2-2b": Shape(26, 2304, 2048, 1024, 9216, 256000, 1),
    "gemma-2-9b": Shape(42, 3584, 4096, 2048, 14336, 256000, 1),
    "gemma-2-27b": Shape(46, 4608, 4096, 2048, 36864, 256000, 1),
    "gemma-3-270m": Shape(18, 640, 1024, 256, 2048, 262144, 1),
    "gemma-3-1b": Shape(26, 1152, 1024, 256, 6912, 262144, 1),
    "gemma-3-4b": Shape(34, 2560, 2048, 1024, 10240, 262208, 1),
    "gemma-3-12b": Shape(48, 3840, 4096, 2048, 15360, 262208, 1),
    "gemma-3-27b": Shape(62, 5376, 4096, 2048, 21504, 262208, 1),
    "mistral-7b": Shape(32, 4096, 4096, 1024, 14336, 32768, 2),
    "smollm2-135m": Shape(30, 576, 576, 192, 1536, 49152, 1),
    "smollm2-360m": Shape(32, 960, 960, 320, 2560, 49152, 1),
    "smollm2-1.7b": Shape(24, 2048, 2048, 2048, 8192, 49152, 1),
}
