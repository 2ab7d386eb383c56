"""Models of the sizes that are measured or planned: shapes with random weights, on which speed, memory and joules don't
depend, or with none."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from semcons_ray.modeling.packaged import resolve_model

SMOLLM2 = "packaged:smollm2-135m-instruct"
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
"""As their publishers have them, but that the larger one has the vocabulary of the smaller."""

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
"""In their place on a CPU."""


@cache
def write_shape(name: str, folder: Path, device: str, small: bool, tokenizer: str | None) -> Path:
    """A Llama of the shape `name` with random weights in bfloat16, and SmolLM2's tokenizer or that of a folder."""
    target = folder / (f"{name}-small" if small else name)
    if (target / "model.safetensors").is_file():
        return target
    words = AutoTokenizer.from_pretrained(tokenizer or resolve_model(SMOLLM2))
    config = AutoConfig.for_model(
        "llama",
        **(SMALL if small else SHAPES[name]),
        vocab_size=len(words),
        max_position_embeddings=8192,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    words.save_pretrained(target)
    return target


def write_hollow(folder: Path, architecture: str, **config: Any) -> Path:
    """A model as far as its size goes: configuration, and names and shapes of its weights, in bfloat16, over a hole in
    the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = AutoConfig.for_model(architecture, **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    header, end = {}, 0
    for key, weight in model.named_parameters():
        begin, end = end, end + 2 * weight.numel()
        header[key] = {"dtype": "BF16", "shape": [*weight.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    settings.architectures = [type(model).__name__]
    settings.save_pretrained(folder)
    return folder
