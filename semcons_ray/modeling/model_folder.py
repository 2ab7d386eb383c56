"""Reads the configuration and the shapes of weights from a language model's folder, without loading the weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from semcons_ray.errors import ModelError, first_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Files that transformers loads: the first that exists."""

OF_ANOTHER_FORM = (ValueError, KeyError, AttributeError, TypeError)
"""What reading raises where JSON holds something else than it should."""


def read_config(folder: Path) -> Any:
    """The configuration by transformers, which has common names for what families name differently (n_embd, d_model
    ...).

    Raises:
        ModelError: There is no configuration, or this version of transformers does not know its kind.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        raise ModelError(f"cannot load model {folder}: its config.json: {first_line(error)}") from error


def read_shapes(folder: Path, config: Any) -> dict[str, list[int]]:
    """Shapes of the weights by name, from the headers of the files that transformers loads and of no other files.

    A folder may hold its weights twice: as its author's own files, or in other precisions.

    Raises:
        ModelError: There are no safetensors weights, or a file is missing or damaged.
    """
    return {key: shape for file in _weight_files(folder, config) for key, shape in _read_header(file).items()}


def _weight_files(folder: Path, config: Any) -> list[Path]:
    named = getattr(config, "transformers_weights", None)
    for name in [named] if named else WEIGHTS:
        if (file := folder / name).is_file():
            return [file] if file.suffix == ".safetensors" else _listed_in(file)
    raise ModelError(f"model {folder}: no model.safetensors file; weights in other formats are not loaded")


def _listed_in(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (OSError, *OF_ANOTHER_FORM) as error:
        raise ModelError(f"model file {index} is damaged: {first_line(error)}") from error


def _read_header(file: Path) -> dict[str, list[int]]:
    # https://huggingface.co/docs/safetensors: 8 bytes of header length, then the header as JSON
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:  # as in a pointer that Git LFS left in its place
                raise ValueError("it does not begin with the length of a header")
            header = json.loads(stream.read(length))
        return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    except FileNotFoundError as error:
        raise ModelError(f"model file {file} is missing") from error
    except (OSError, struct.error, *OF_ANOTHER_FORM) as error:
        raise ModelError(f"model file {file} is damaged: {first_line(error)}") from error
