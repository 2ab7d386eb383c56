"""How much memory a worker needs, read from a model's files before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

from semcons_ray.config import Quantization
from semcons_ray.modeling.dimensions import Dimensions
from semcons_ray.modeling.model_folder import read_config, read_shapes

PROCESS_BYTES = 600 << 20
"""A process that has imported torch, transformers and PEFT, and the libraries' caches, measured on Linux."""

TOKENIZER_GROWTH = 10
"""A tokenizer's memory a byte of its file: 9.7 and 9.8 measured, by what Gemma 3's and Qwen2.5's add to SmolLM2's."""

HEAP_GROWTH = 2
"""A process's heap against what is alive in it at most. The C library gives memory back from the heap's end only, and
a batch leaves holes: 1.6 to 2.0 measured with six layers of each of the three models and batches of one length.
Batches of ever new lengths leave more."""

CUDA_HOST_BYTES = 1 << 30
"""What CUDA's libraries add to a process in host memory. Not measured yet."""

CUDA_DEVICE_BYTES = 512 << 20
"""What a process takes of a GPU before anything is computed: its context and kernels. Not measured yet."""

LOADING_MATRICES = 4
"""Weights on their way to a GPU at a time: transformers loads with as many threads, one tensor each. The files behind
them are mapped into memory, which the system takes back when it needs it."""

LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Models whose layers are built alike, and keep less for the backward pass than the bound for all others."""

ENGINE_PROCESS_BYTES = 1500 << 20
"""A process that has imported vLLM, with what it computes in on a CPU: 1350 MiB measured on Linux beside weights and
cache, most of it copies of adapters for every token of a batch of prompts."""

ENGINE_DEVICE_BYTES = 2 << 30
"""What an engine on a GPU takes beside weights and cache: its context, graphs and activations. Not measured yet."""

EXPERTS = ".experts."
"""In the names of weights of a mixture's experts."""

LOSS_ROWS = 64
"""Rows of logits that are turned into losses at a time."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""A weight's: 4 bit keeps a float32 scale for each 64. The scale for each row of 8 bit is too little to count."""


@dataclass(frozen=True)
class Footprint:
    """Bytes a worker needs, and whether of host memory or of a GPU's.

    On the CPU all is in host memory. On a GPU the weights, what is computed and the adapter with its optimizer state
    are there; the host has the process, the tokenizer and what is being loaded. Adapters are too small to count.

    Attributes:
        weights: The model's; of a quantised one with the largest matrix once more, as it is when it is computed with.
        activations: Of a training batch, or the cache of keys and values of a batch of answers: the larger.
        logits: Of a training or an evaluation batch, with what becomes of them.
        tokenizer: The tokenizer's tables.
        process: The process itself.
        largest: The largest of the weights' matrices; in `weights` as well.
        loading: Of the largest `LOADING_MATRICES` of them.
        offloaded: Weights that a worker on a GPU keeps in host memory, and fetches while it computes with them.
        device: "cpu" or "cuda".
    """

    weights: int
    activations: int
    logits: int
    tokenizer: int = 0
    process: int = PROCESS_BYTES
    largest: int = 0
    loading: int = 0
    offloaded: int = 0
    device: str = "cpu"

    def divided(self, ranks: int, *, offloaded: bool = False) -> Footprint:
        """Of one of the ranks that hold equal parts of the weights, and gather a matrix while they compute with it.

        `offloaded` says whether a rank on a GPU has its part in host memory.
        """
        part = ceil(self.weights / ranks)
        if offloaded and self.device == "cuda":
            return replace(self, weights=self.largest, offloaded=part)
        return replace(self, weights=part + self.largest)

    @property
    def host_bytes(self) -> int:
        """What the worker needs of the host's memory.

        On the CPU, logits are too large for the heap, and leave no holes. They come on top of the heap at its largest,
        since it does not shrink when a batch is done.
        """
        if self.device == "cuda":
            return self.process + CUDA_HOST_BYTES + self.tokenizer + self.loading + self.offloaded
        return self.weights + HEAP_GROWTH * self.activations + self.logits + self.tokenizer + self.process

    @property
    def device_bytes(self) -> int:
        """What the worker needs of its GPU's memory."""
        if self.device == "cuda":
            return self.weights + self.activations + self.logits + CUDA_DEVICE_BYTES
        return 0


def measure_footprint(
    folder: Path,
    *,
    dtype: str,
    max_length: int,
    batch_size: int,
    generation_batch_size: int,
    max_new_tokens: int,
    quantization: Quantization = "none",
    device: str = "cpu",
) -> Footprint:
    """Footprint of one worker on `device` that trains, evaluates and runs the model in `folder`.

    Weights are counted from the headers of the safetensors files. A training batch of B sequences of T tokens keeps
    for the backward pass, for each token and layer, at most 10 hidden vectors, 9 as wide as all attention heads, keys
    and values, 4 of the feed-forward width, and T attention weights of each head in float32. That is what a layer of
    Gemma 3 keeps; one of Llama or Qwen2 keeps 7, 6, none and 4. Each bound takes sequences as long as they may be.
    Experts take a token's vector and give one back each, and their weights are kept once more; recurrent layers keep
    and compute with what `Dimensions` says.

    On GPUs attention is one kernel, which computes its weights anew in the backward pass. It keeps no more than the
    mask, T numbers of the model's dtype, and the rest is 10, 6, keys and values, and 4; for models that are
    `LLAMA_LIKE` 6, 4, none and 4.

    Logits are of the responses, half of the tokens at most. In training each is there in the model's dtype and as a
    float32 log-probability; in evaluation, whose batches are as large as those of answers, in the model's dtype. On top
    come two float32 copies of `LOSS_ROWS` rows.

    Raises:
        ModelError: The folder holds no safetensors weights, or no config.json that says how large the model is.
    """
    config = read_config(folder)
    shapes, size = read_shapes(folder, config), _BYTES[dtype]
    of = Dimensions.of(config)
    attention = (3 if of.drops_attention else 1) * of.heads * max_length * 4
    vectors = 10 * of.width + 9 * of.heads * of.head_width + of.key_values
    if device == "cuda":
        attention = max_length * size
        vectors = 10 * of.width + 6 * of.heads * of.head_width + of.key_values
        if config.model_type in LLAMA_LIKE:
            vectors = 6 * of.width + 4 * of.heads * of.head_width
    vectors += 4 * of.feed_forward + 2 * of.experts * of.width
    kept = batch_size * max_length * of.layers * (vectors * size + attention)
    kept += batch_size * of.padded(max_length) * (of.layers * of.state + of.working) * 4
    kept += sum(prod(shape) for key, shape in shapes.items() if EXPERTS in key) * size
    cache = generation_batch_size * (max_length + max_new_tokens) * of.layers * of.key_values * size
    learnt, scored = batch_size * max_length // 2, generation_batch_size * max_length // 2
    rows = max(learnt * (size + 4), scored * size) + LOSS_ROWS * 8
    tokenizer = folder / "tokenizer.json"
    return Footprint(
        weights=_weight_bytes(shapes, size, quantization),
        activations=max(kept, cache),
        logits=of.vocabulary * rows,
        tokenizer=TOKENIZER_GROWTH * tokenizer.stat().st_size if tokenizer.is_file() else 0,
        largest=max(map(prod, shapes.values()), default=0) * size,
        loading=sum(sorted(map(prod, shapes.values()))[-LOADING_MATRICES:]) * size,
        device=device,
    )


def measure_engine(folder: Path, *, dtype: str, cache_bytes: int, device: str) -> tuple[int, int]:
    """Bytes of host and of GPU memory that a vLLM engine of the model in `folder` needs.

    Raises:
        ModelError: The folder holds no safetensors weights.
    """
    weights = _weight_bytes(read_shapes(folder, read_config(folder)), _BYTES[dtype], "none")
    if device == "cpu":
        return ENGINE_PROCESS_BYTES + weights + cache_bytes, 0
    return ENGINE_PROCESS_BYTES, weights + cache_bytes + ENGINE_DEVICE_BYTES


def _weight_bytes(shapes: Mapping[str, Sequence[int]], size: int, quantization: Quantization) -> int:
    parameters = sum(prod(shape) for shape in shapes.values())
    if quantization == "none":
        return parameters * size
    # bitsandbytes leaves the output embedding as it is, and what is no matrix product.
    matrices = [
        prod(shape)
        for key, shape in shapes.items()
        if len(shape) == 2 and key.endswith(".weight") and not any(name in key for name in ("embed", "lm_head"))
    ]
    quantised = sum(matrices)
    working = max(matrices, default=0) * size
    return (parameters - quantised) * size + int(quantised * _QUANTIZED_BYTES[quantization]) + working
