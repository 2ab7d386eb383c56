"""Estimates, from a model's files and before anything is loaded, how much memory a worker needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod
from pathlib import Path

from semcons_ray.config import Attention, LoraConfig, Quantization
from semcons_ray.modeling.dimensions import Dimensions
from semcons_ray.modeling.model_folder import read_config, read_shapes

PROCESS_BYTES = 600 << 20
"""A process that has imported torch, transformers and PEFT, and the libraries' caches, measured on Linux."""

TOKENIZER_GROWTH = 10
"""Bytes of memory of a tokenizer for each byte of its file: 9.7 and 9.8 measured, as the difference that Gemma 3's and
Qwen2.5's make to SmolLM2's."""

HEAP_GROWTH = 2
"""Size of a process's heap relative to the most that was alive in it. The C library gives memory back from the heap's
end only, and a batch leaves holes: 1.6 to 2.0 measured with six layers of each of the three models and batches of one
length. Batches of ever new lengths leave more."""

CUDA_HOST_BYTES = 1 << 30
"""Host memory that CUDA's libraries add to a process. Assumed, not measured yet."""

CUDA_DEVICE_BYTES = 768 << 20
"""GPU memory that a process takes beside what it computes with: 694 to 704 MiB of context and kernels, measured on an
H200, and 64 MiB in which cuBLAS works."""

CUDA_GROWTH = 1.03
"""GPU memory that torch's allocator holds, relative to what is alive in it. What is left of a block is too small for
the next tensor: 1 to 4% measured on an H200, with the adapter and its optimizer's state."""

LOADING_MATRICES = 4
"""Number of weights that are on their way to a GPU at the same time: transformers loads with as many threads, one
tensor each. The files behind them are mapped into memory, which the system takes back when it needs it."""

TRAINED_BYTES = 24
"""Bytes of a weight that is trained where it is trained: itself and its gradient in the model's dtype, at most 4 each,
and the master weight, its gradient and two moments of AdamW in float32."""

STORED_BYTES = 32
"""Bytes of it in host memory between steps and visits, in float32: the first value, the adapter before, while and after
it is trained, its moving average, and what is written or sent."""

DORA_MATRICES = 4
"""Number of matrices, each counted as the largest of the model, that DoRA needs to compute the norms of a layer."""

PLAIN, NORMED, BOUND = (6, 4, 0), (6, 6, 1), (10, 6, 1)
KEPT = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "granite"), PLAIN),
    **dict.fromkeys(("qwen3", "olmo2"), NORMED),
}
"""What a layer keeps of a token for its backward pass, by family: how many hidden vectors, vectors as wide as all
attention heads, and keys with values; a bound for all others. Measured: exactly that."""

ENGINE_PROCESS_BYTES = 1500 << 20
"""A process that has imported vLLM, with its working memory on a CPU: 1350 MiB measured on Linux beside weights and
cache, most of it copies of adapters for every token of a batch of prompts."""

ENGINE_DEVICE_BYTES = 2 << 30
"""GPU memory that an engine takes beside weights and cache: its context, graphs and activations. Assumed, not measured
yet."""

EXPERTS = ".experts."
"""Part of the names of the weights of a mixture's experts."""

LOSS_ROWS = 64
"""Number of rows of logits that are turned into losses at a time."""

RECOMPUTED = 1.5
"""With checkpointing, the most that is alive of one layer, relative to what it keeps for its backward pass: 1.1 to 1.4
measured with the families of which a bound is tested, gradients included."""

DEFAULT_ADAPTER = LoraConfig()

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a weight. With 4 bits there is a float32 scale for each 64 weights; the scale for each row with 8 bits is
too small to count."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a worker needs, of host memory and of a GPU's.

    On the CPU everything is in host memory. With a GPU, weights, activations and the adapter with its optimizer state
    are on the GPU; the host has the process, the tokenizer, adapters between steps and what is being loaded.

    Attributes:
        weights: The model's weights; with quantisation, also the largest matrix as it is when computed with.
        activations: What a training batch keeps for its backward pass. It is gone when answers are written.
        logits: Logits of a training or an evaluation batch, and what is computed from them.
        cache: The key-value cache of a batch of answers.
        tokenizer: The tokenizer's tables.
        process: The process itself.
        largest: The largest weight matrix, which is part of `weights` as well.
        trained: Number of weights that are trained: the adapter's, and those of modules that are trained whole. Of
            several ranks, each has them all.
        loading: The largest `LOADING_MATRICES` weight matrices.
        offloaded: Weights that a worker on a GPU keeps in host memory, and fetches while it computes with them.
        device: "cpu" or "cuda".
    """

    weights: int
    activations: int
    logits: int
    cache: int = 0
    tokenizer: int = 0
    process: int = PROCESS_BYTES
    largest: int = 0
    trained: int = 0
    loading: int = 0
    offloaded: int = 0
    device: str = "cpu"

    def divided(self, ranks: int, *, offloaded: bool = False) -> Footprint:
        """The footprint of one of several ranks, which hold equal parts of the weights and gather each matrix for use.

        Args:
            ranks: Number of ranks.
            offloaded: Whether a rank on a GPU keeps its part in host memory.
        """
        part = ceil(self.weights / ranks)
        if offloaded and self.device == "cuda":
            return replace(self, weights=self.largest, offloaded=part)
        return replace(self, weights=part + self.largest)

    @property
    def working(self) -> int:
        """Bytes of a training batch or of the cache, whichever is larger."""
        return max(self.activations, self.cache)

    @property
    def training_state(self) -> int:
        """Bytes of what is trained where it is trained, with gradients and the optimizer's state."""
        return self.trained * TRAINED_BYTES

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the worker needs."""
        stored = self.trained * STORED_BYTES
        if self.device == "cuda":
            return self.process + CUDA_HOST_BYTES + self.tokenizer + self.loading + self.offloaded + stored
        return sum(self.parts.values()) + stored

    @property
    def device_bytes(self) -> int:
        """Bytes of its GPU's memory that the worker needs; 0 on the CPU."""
        return sum(self.parts.values()) if self.device == "cuda" else 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for, of the memory with which the worker computes: a GPU's, or the host's.

        On the CPU, logits are allocated outside the heap and leave no holes. They are added to the heap at its largest,
        since it does not shrink after a batch.
        """
        batch = "activations" if self.activations > self.cache else "key-value cache"
        parts = {"weights": self.weights, "adapter and its optimizer": self.training_state, batch: self.working,
                 "logits": self.logits}  # fmt: skip
        if self.device == "cuda":
            parts["fragmentation"] = int((CUDA_GROWTH - 1) * (self.working + self.logits))
            return parts | {"context": CUDA_DEVICE_BYTES}
        parts["fragmentation"] = (HEAP_GROWTH - 1) * self.working
        return parts | {"process": self.process + self.tokenizer}


def measure_footprint(
    folder: Path,
    *,
    dtype: str,
    max_length: int,
    batch_size: int,
    generation_batch_size: int,
    max_new_tokens: int,
    num_samples: int = 1,
    attn_implementation: Attention | None = None,
    lora: LoraConfig = DEFAULT_ADAPTER,
    quantization: Quantization = "none",
    gradient_checkpointing: bool = False,
    device: str = "cpu",
) -> Footprint:
    """The footprint of a worker that trains, evaluates and answers with the model in `folder`.

    Weights are counted from the headers of the safetensors files. For the backward pass of a training batch, each token
    keeps in each layer at most 10 hidden vectors, 9 vectors as wide as all attention heads, keys and values, 4 vectors
    of the feed-forward width, and for each head T attention weights in float32, where T is `max_length`. That is what a
    layer of Gemma 3 keeps; see `KEPT` for less. All sequences are taken to be T tokens long.
    Each expert takes a vector of a token and gives one back, and experts' weights are kept once more. For recurrent
    layers see `Dimensions`. With checkpointing, all this is kept of one layer at a time, while it is computed again
    (see `RECOMPUTED`), and of each layer only the hidden vectors that go into it.

    On GPUs attention is one kernel, which computes its weights again in the backward pass. It keeps only the mask, T
    numbers of the model's dtype, and 3 vectors as wide as all heads less.
    Attention that is `eager` is no such kernel, and keeps its weights in the model's dtype as well, if that is another.
    With checkpointing, the logits' own memory is free again when the layers are computed again, which use it; that of
    the log-probabilities is in pieces too small for them.

    DoRA keeps up to three times more of what each linear layer gives, and makes a few matrices as large as a layer's
    weights when it computes their norms.

    Logits are computed for responses only, at most half of the tokens. In training each is kept in the model's dtype
    and as a float32 log-probability; in evaluation, whose batches are as large as those of answers, in the model's
    dtype. Two float32 copies of `LOSS_ROWS` rows are added.

    Args:
        folder: Folder with the model's files.
        dtype: Type of the weights: "bfloat16", "float16" or "float32".
        max_length: Most tokens of a prompt with its response.
        batch_size: Examples in a training batch, of which an optimizer step may have several.
        generation_batch_size: Prompts in a batch of answers, and examples in a batch of evaluation.
        max_new_tokens: Longest answer, in tokens.
        num_samples: Answers to a prompt. From two on, the cache of what was read is kept beside that of an answer.
        attn_implementation: See `LanguageModel`.
        lora: The adapter, and modules that are trained whole.
        quantization: Bits of the weights.
        gradient_checkpointing: Whether training computes activations again instead of keeping them.
        device: "cpu" or "cuda".

    Raises:
        ModelError: The folder holds no safetensors weights, or no config.json that says how large the model is; or the
            adapter does not fit it.
    """
    config = read_config(folder)
    shapes, size = read_shapes(folder, config), _BYTES[dtype]
    of = Dimensions.of(config)
    weight = 4 + (size if attn_implementation == "eager" and size < 4 else 0)
    attention = (3 if of.drops_attention else 1) * of.heads * max_length * weight
    of_width, of_heads, of_keys = KEPT.get(config.model_type, BOUND)
    if device == "cuda" and attn_implementation != "eager":
        attention = max_length * size
    else:
        of_heads += 3
    vectors = of_width * of.width + of_heads * of.heads * of.head_width + of_keys * of.key_values
    vectors += 4 * of.feed_forward + 2 * of.experts * of.width
    if lora.use_dora:
        vectors += 3 * (2 * of.width + of.heads * of.head_width + of.key_values + 2 * of.feed_forward)
    whole = RECOMPUTED if gradient_checkpointing else of.layers
    in_layers = int(batch_size * max_length * whole * (vectors * size + attention))
    in_layers += int(batch_size * of.padded(max_length) * (whole * of.state + of.working) * 4)
    kept = in_layers
    if gradient_checkpointing:
        kept += batch_size * max_length * of.layers * of.width * size
    kept += sum(prod(shape) for key, shape in shapes.items() if EXPERTS in key) * size
    kept_tokens = max_length + max_new_tokens + (max_length if num_samples > 1 else 0)
    cache = generation_batch_size * kept_tokens * of.layers * of.key_values * size
    learnt, scored = batch_size * max_length // 2, generation_batch_size * max_length // 2
    rows = max(learnt * (size + 4), scored * size) + LOSS_ROWS * 8
    used_again = min(in_layers, of.vocabulary * learnt * size) if device == "cuda" and gradient_checkpointing else 0
    tokenizer, largest = folder / "tokenizer.json", max(map(prod, shapes.values()), default=0) * size
    return Footprint(
        weights=_weight_bytes(shapes, size, quantization) + (DORA_MATRICES * largest if lora.use_dora else 0),
        activations=kept,
        logits=of.vocabulary * rows - used_again,
        cache=cache,
        tokenizer=TOKENIZER_GROWTH * tokenizer.stat().st_size if tokenizer.is_file() else 0,
        largest=largest,
        trained=_num_trained(folder, (folder / "config.json").stat().st_mtime_ns, lora),
        loading=sum(sorted(map(prod, shapes.values()))[-LOADING_MATRICES:]) * size,
        device=device,
    )


@lru_cache(maxsize=16)
def _num_trained(folder: Path, written_ns: int, lora: LoraConfig) -> int:
    """Number of weights that are trained, by a config.json that was written then. It is the same for all settings of
    batches, and takes building the model, though without memory, so it is counted once."""
    from semcons_ray.modeling.lora import trained_shapes  # peft and torch load slowly

    return sum(map(prod, trained_shapes(read_config(folder), lora, folder.name).values()))


def measure_engine(folder: Path, *, dtype: str, cache_bytes: int, device: str) -> tuple[int, int]:
    """Bytes of host memory and of GPU memory that a vLLM engine of the model in `folder` needs.

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
