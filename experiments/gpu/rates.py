"""Parts about one model in one process: options of training, planned memory, and speed at batches of several sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from clocks import empty_memory, gpu_bytes, seconds
from shapes import SHAPES, write_shape

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.modeling.footprint import measure_footprint
from semcons_ray.modeling.language_model import LanguageModel, Pair

OPTIONS = Path(__file__).parents[1] / "benchmarks" / "training" / "options.py"
POINTS = ((512, 8, False), (1024, 16, False), (2048, 8, False), (2048, 32, True))
"""max_length, batch_size, gradient_checkpointing."""
BATCHES = (1, 8, 32)


def options(device: str, small: bool, models: Path, tokenizer: str | None = None) -> dict[str, Any]:
    """experiments/benchmarks/training/options.py with each shape, and each kind of attention that is installed."""
    sizes = {"max-length": 128, "batch-size": 4, "examples": 16, "repetitions": 1}
    if not small:
        sizes = {"max-length": 1024, "batch-size": 8, "examples": 64, "repetitions": 2}
    kinds = ["sdpa", *(["flash_attention_2"] if device == "cuda" and importlib.util.find_spec("flash_attn") else [])]
    found: dict[str, Any] = {}
    for name in SHAPES:
        folder = write_shape(name, models, device, small, tokenizer)
        for kind in kinds:
            with tempfile.TemporaryDirectory() as beside:
                out = Path(beside) / "options.json"
                words = ["--model", str(folder), "--device", device, "--attention", kind, "--out", str(out)]
                for option, size in sizes.items():
                    words += [f"--{option}", str(size)]
                subprocess.run([sys.executable, str(OPTIONS), *words], check=True, stdout=subprocess.DEVNULL)
                measured = json.loads(out.read_text(encoding="utf-8"))
            del measured["environment"], measured["settings"]["model"]
            found[f"{name}, {kind}"] = measured
    return found


def memory(device: str, small: bool, models: Path, tokenizer: str | None = None) -> dict[str, Any]:
    """Of a step over full rows, the GPU memory that is planned and taken; on a CPU neither weights nor process."""
    found: dict[str, Any] = {}
    for name in SHAPES:
        folder = write_shape(name, models, device, small, tokenizer)
        points = ((64, 4, False), (64, 4, True)) if small else POINTS
        model = _loaded(folder, device, max(length for length, _, _ in points))
        for length, batch, checkpointing in points:
            planned = measure_footprint(
                folder, dtype="bfloat16", max_length=length, batch_size=batch, generation_batch_size=1,
                max_new_tokens=1, gradient_checkpointing=checkpointing, device=device,
            )  # fmt: skip
            training = TrainingConfig(batch_size=batch, gradient_checkpointing=checkpointing)
            pairs = _full_rows(length, batch)
            empty_memory(device)
            model.fine_tune(model.fresh_adapter(), pairs, training, np.random.default_rng(0))
            taken, context = gpu_bytes() if device == "cuda" else (_live_bytes(model, pairs, training), 0)
            bytes_planned = planned.device_bytes if device == "cuda" else planned.activations + planned.logits
            found[f"{name}, {batch} x {length}{', checkpointing' if checkpointing else ''}"] = {
                "planned_mib": bytes_planned >> 20,
                "taken_mib": taken >> 20,
                "context_mib": context >> 20,
                "ratio": round(bytes_planned / taken, 2),
            }
        del model
    return found


def devices(device: str, small: bool, models: Path, tokenizer: str | None = None) -> dict[str, Any]:
    """Tokens/s of training on full rows, and of answers that never end before their last token."""
    found: dict[str, Any] = {}
    for name in SHAPES:
        model = _loaded(write_shape(name, models, device, small, tokenizer), device, 64 if small else 512)
        for batch in BATCHES[:2] if small else BATCHES:
            found[f"{name}, {batch}"] = _rates(model, batch, small)
    return found


def _rates(model: LanguageModel, batch: int, small: bool) -> dict[str, float]:
    length, asked, new, steps = (64, 32, 4, 2) if small else (512, 128, 64, 6)
    training = TrainingConfig(batch_size=batch)
    generation = GenerationConfig(batch_size=batch, max_new_tokens=new, temperature=1.0)
    rows, prompts = _full_rows(length, batch * steps), [pair.prompt for pair in _full_rows(asked, batch)]
    adapter, tokens = model.fresh_adapter(), dict[str, int]()

    def train() -> None:
        tokens["trained"] = model.fine_tune(adapter, rows, training, np.random.default_rng(0)).tokens

    def answer() -> None:
        tokens["generated"] = model.generate(adapter, prompts, generation, np.random.default_rng(0))[1]

    works = {"trained": train, "generated": answer}
    for work in works.values():
        work()  # the first call of each size sets up its kernels
    device = model.device.type
    return {f"{what}_tokens_per_second": round(tokens[what] / seconds(device, works[what]), 1) for what in works}


def _loaded(folder: Path, device: str, max_length: int) -> LanguageModel:
    return LanguageModel(str(folder), lora=LoraConfig(), dtype="bfloat16", device=device, max_length=max_length)


def _full_rows(length: int, count: int) -> list[Pair]:
    """Pairs of about `length` tokens, half of them the answer's."""
    words = ("about", "after", "again", "along", "among", "around", "before", "behind", "below", "between", "beyond")
    half = length // 2 - 8  # what the template adds
    texts = [" ".join(words[(i + j) % len(words)] for j in range(half)) for i in range(count)]
    return [Pair(text, text) for text in texts]


def _live_bytes(model: LanguageModel, pairs: list[Pair], training: TrainingConfig) -> int:
    spec = importlib.util.spec_from_file_location("live_bytes", OPTIONS.with_name("live_bytes.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.LiveBytes() as live:
        model.fine_tune(model.fresh_adapter(), pairs, training, np.random.default_rng(0))
    return int(live.peak)
