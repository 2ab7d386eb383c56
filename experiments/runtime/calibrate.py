"""How well does the device model of the virtual clock predict work that it was not fitted on?"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.modeling.shapes import SHAPES, Shape
from semcons_ray.timeline.devices import Device, Model
from semcons_ray.timeline.profiles import device as profile

SMOLLM2 = "packaged:smollm2-135m-instruct"
MEASURED = Path(__file__).parent / "two-cores.csv"
PREDICTED = Path(__file__).parent / "calibration.csv"
H200 = Path(__file__).parents[1] / "gpu" / "results.json"
HEAD = 64
"""Size of an attention head in every shape measured."""


class Setting(NamedTuple):
    """One thing to measure."""

    work: str
    shape: str
    batch: int
    length: int
    """Tokens of a row that is trained on, or of a prompt."""


SETTINGS = [
    *(Setting("train", "smollm2-135m", 4, length) for length in (64, 128, 256, 512)),
    *(Setting("train", "smollm2-135m", batch, 128) for batch in (1, 8)),
    *(Setting("train", "smollm2-360m", 4, length) for length in (128, 256)),
    Setting("train", "llama-3.2-1b", 4, 128),
    *(Setting("generate", "smollm2-135m", batch, 128) for batch in (1, 4, 8, 16)),
    *(Setting("generate", "smollm2-135m", 8, length) for length in (32, 512)),
    *(Setting("generate", "smollm2-360m", batch, 128) for batch in (1, 8)),
    Setting("generate", "llama-3.2-1b", 1, 128),
]
NEW_TOKENS = 32


def measure() -> Iterator[dict[str, object]]:
    """Processor seconds of each setting: the fewest of three runs, after one that sets up kernels.

    On one thread they are the seconds that it takes where nothing else runs.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(setting.shape for setting in SETTINGS):
            model = _random_model(SHAPES[name], Path(folder) / name)
            for setting in SETTINGS:
                if setting.shape == name:
                    yield {**setting._asdict(), **_measured(model, setting)}


def _measured(model: LanguageModel, setting: Setting) -> dict[str, float]:
    adapter = model.fresh_adapter()
    if setting.work == "train":
        rows, training = _full_rows(setting.length, setting.batch), TrainingConfig(batch_size=setting.batch)

        def work() -> int:
            return model.fine_tune(adapter, rows, training, np.random.default_rng(0)).tokens
    else:
        prompts = [pair.prompt for pair in _full_rows(2 * setting.length, setting.batch)]
        generation = GenerationConfig(batch_size=setting.batch, max_new_tokens=NEW_TOKENS, temperature=1.0)

        def work() -> int:
            return model.generate(adapter, prompts, generation, np.random.default_rng(0))[1]

    tokens = work()
    return {"tokens": tokens, "seconds": round(min(_seconds(work) for _ in range(3)), 4)}


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _full_rows(length: int, count: int) -> list[Pair]:
    """Pairs of about `length` tokens, half of them the answer's."""
    words = ("about", "after", "again", "along", "among", "around", "before", "behind", "below", "between", "beyond")
    half = max(length // 2 - 8, 1)  # without what the template adds
    texts = [" ".join(words[(i + j) % len(words)] for j in range(half)) for i in range(count)]
    return [Pair(text, text) for text in texts]


def _random_model(shape: Shape, folder: Path) -> LanguageModel:
    """A Llama of a shape with random weights in bfloat16, and SmolLM2's tokenizer and vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2))
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.queries // HEAD,
        num_key_value_heads=shape.keys // HEAD,
        head_dim=HEAD,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LanguageModel(str(folder), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=2048)


def predictions() -> pd.DataFrame:
    """What the device model says of each measurement, and how far off it is, with what it was fitted on marked."""
    tables = [_of_two_cores(), *(_of_h200(fitted) for fitted in ("smollm2-135m", "llama-3.2-1b"))]
    return pd.concat(tables, ignore_index=True)


def _of_two_cores() -> pd.DataFrame:
    """Fitted on the smallest and the largest model, each at one batch and one length."""
    rows = pd.read_csv(MEASURED)
    answering = rows["work"] == "generate"
    rows["steps"] = np.where(answering, rows["tokens"] / rows["batch"], 1)
    rows["prompt_tokens"] = np.where(answering, rows["batch"] * rows["length"], 0)
    usual = (rows["length"] == 128) & (rows["batch"] == np.where(answering, 1, 4))
    rows["fitted"] = usual & rows["shape"].isin(["smollm2-135m", "llama-3.2-1b"])
    models = [_as_measured(name) for name in rows["shape"]]
    trained, answered = (
        [(models[i], rows.loc[i]) for i in rows.index[rows["fitted"] & (answering == works)]] for works in (False, True)
    )
    seconds_per_flop, seconds_per_width = np.linalg.solve(
        [[4 * model.parameters * row.tokens, model.layers * model.width * row.tokens] for model, row in trained],
        [row.seconds for _, row in trained],
    )

    device = replace(profile("two-cores"), peak_tflops=1e-12 / seconds_per_flop)
    device = replace(device, activation_bytes=seconds_per_width * device.bytes_per_second)
    seconds_per_layer, seconds_per_byte = np.linalg.solve(
        [
            [row.steps * model.layers, row.steps * (model.weight_bytes + row.batch * context * model.key_value_bytes)]
            for model, row in answered
            for context in [_context(row)]
        ],
        [
            row.seconds
            - device.embedding_seconds(row.prompt_tokens, model)
            - 2 * model.parameters * row.tokens * seconds_per_flop
            for model, row in answered
        ],
    )
    device = replace(
        device,
        memory_bandwidth_gb_s=1e-9 / seconds_per_byte,
        activation_bytes=seconds_per_width / seconds_per_byte,
        generation_layer_seconds=seconds_per_layer,
    )
    for field in ("peak_tflops", "memory_bandwidth_gb_s", "activation_bytes", "generation_layer_seconds"):
        print(f"two-cores, {field}: {getattr(device, field):.4g}")
    return _beside(rows.assign(device="two-cores"), models, device)


def _of_h200(fitted: str) -> pd.DataFrame:
    """Seconds a layer, and of the larger model what the card reaches, from one shape; the other is held out."""
    found = json.loads(H200.read_text(encoding="utf-8"))["devices"]
    rows = pd.DataFrame([
        {"work": work, "shape": name, "batch": batch, "length": length, "tokens": tokens, "seconds": tokens / rate,
         "steps": steps, "prompt_tokens": 0}
        for place, rates in found.items()
        for name, batch in [(place.split(", ")[0], int(place.split(", ")[1]))]
        for work, length, tokens, steps, rate in (
            ("train", 512, 512 * batch, 1, rates["trained_tokens_per_second"]),
            ("generate", 128, 64 * batch, 64, rates["generated_tokens_per_second"]),
        )
    ])  # fmt: skip
    rows["fitted"] = rows["shape"] == fitted
    models = [_as_measured(name) for name in rows["shape"]]
    layers = np.array([model.layers for model in models])
    a_layer = rows["seconds"] / rows["steps"] / layers
    bound = rows["fitted"] & (rows["batch"] < 32)
    device = replace(
        profile("h200-eager"),
        training_layer_seconds=float(a_layer[bound & (rows["work"] == "train")].mean()),
        generation_layer_seconds=float(a_layer[rows["fitted"] & (rows["work"] == "generate")].mean()),
    )
    if fitted == "smollm2-135m":  # the host bounds all of its steps, so that they don't show what the card reaches
        device = replace(device, training_utilization=profile("h200").training_utilization)
    for field in ("training_layer_seconds", "generation_layer_seconds"):
        print(f"h200-eager, fitted on {fitted}, {field}: {getattr(device, field):.4g}")
    return _beside(rows.assign(device=f"h200-eager, fitted on {fitted}"), models, device)


def _beside(rows: pd.DataFrame, models: list[Model], device: Device) -> pd.DataFrame:
    predicted = [
        device.training_seconds(row.tokens, model, row.steps)
        if row.work == "train"
        else device.generation_seconds(
            row.tokens, model, row.batch, row.prompt_tokens, _context(row)
        )
        for model, row in zip(models, rows.itertuples(), strict=True)
    ]
    columns = ["device", "work", "shape", "batch", "length", "fitted", "seconds"]
    error = np.array(predicted) / rows["seconds"] - 1
    return rows[columns].assign(predicted=predicted, error=error).round({"seconds": 4, "predicted": 4, "error": 3})


def _context(row: Any) -> float:
    """Tokens before the one that is being written, on average."""
    return float(row.length + row.steps / 2)


def _as_measured(name: str) -> Model:
    """A shape with SmolLM2's vocabulary, as the measured ones have it."""
    return Model.of(SHAPES[name]._replace(vocabulary=SHAPES["smollm2-135m"].vocabulary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help=f"measure this machine anew, into {MEASURED.name}")
    if parser.parse_args().measure:
        pd.DataFrame(measure()).to_csv(MEASURED, index=False)
    found = predictions()
    found.to_csv(PREDICTED, index=False)
    print(found.to_string(index=False))
    held_out = found[~found["fitted"]].assign(error=found["error"].abs())
    print(held_out.groupby(["device", "work"])["error"].describe()[["count", "50%", "75%", "max"]])


if __name__ == "__main__":
    main()
