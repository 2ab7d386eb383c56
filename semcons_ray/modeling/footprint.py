"""How much memory a worker needs, read from a model's files before anything is loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from semcons_ray.errors import ModelError

PROCESS_BYTES = 600 << 20
"""A process that has imported torch, transformers and PEFT, and the allocator's slack, measured on Linux."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Footprint:
    """Bytes a worker needs: `weights` once, `activations` at the peak of a batch, `process` for itself."""

    weights: int
    activations: int
    process: int = PROCESS_BYTES

    @property
    def host_bytes(self) -> int:
        """What a worker on the CPU needs of the host's memory."""
        return self.weights + self.activations + self.process

    @property
    def device_bytes(self) -> int:
        """What a worker on a GPU needs of the GPU's memory."""
        return self.weights + self.activations


def measure_footprint(folder: Path, *, dtype: str, max_length: int, batch_size: int) -> Footprint:
    """Footprint of one worker that trains and runs the model in `folder`.

    Weights are counted from the headers of the safetensors files. Activations are bounded by what a training batch
    of B sequences of T tokens keeps for the backward pass: about 26 hidden vectors and 3 of the feed-forward width
    a layer, the attention weights three times in float32, and logits with their gradients of the responses, which are
    half of the tokens at most. For SmolLM2-135M in bfloat16 on a CPU with B 8 and T 192, responses that long, this is
    3.4 GB; the process was seen to grow by 3.4.

    Raises:
        ModelError: The folder holds no safetensors weights or no readable config.json.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model {folder}: no .safetensors file; weights in other formats are not loaded")
    parameters = sum(_count_parameters(file) for file in files)
    config = _read_config(folder)
    width, layers = int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
    feed_forward = int(config.get("intermediate_size", 4 * width))
    tokens, size = batch_size * max_length, _BYTES[dtype]
    kept = tokens * layers * (26 * width + 3 * feed_forward) * size
    attention = 3 * tokens * max_length * layers * int(config.get("num_attention_heads", 0)) * 4
    logits = tokens // 2 * int(config.get("vocab_size", 0)) * 16
    return Footprint(weights=parameters * size, activations=kept + attention + logits)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {folder}: cannot read config.json ({error})") from error
    return dict(config.get("text_config") or config)


def _count_parameters(file: Path) -> int:
    # https://huggingface.co/docs/safetensors: 8 bytes of header length, then the header as JSON
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"model file {file} is damaged: {error}") from error
    return sum(prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
