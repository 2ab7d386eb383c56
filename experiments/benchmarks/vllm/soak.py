"""Does the engine stay what it is? 200 adapters are handed over one after the other, each is asked a few questions, and
after each of them its memory is read.

    OMP_NUM_THREADS=1 python experiments/benchmarks/vllm/soak.py [--dtype float32]

Adapters are drawn at random and large, so that each answers otherwise than the others; rounding in bfloat16 is then
large, too, and in float32 it decides nothing. An answer is right if its first token is nearer to the likeliest one by
transformers with the same adapter and dtype than with the adapter before it; where it is as near, the question tells
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import psutil
import torch

from semcons_ray.config import GenerationConfig, LoraConfig
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.modeling.vllm_engine import EngineSpec

HERE = Path(__file__).parent
NAME = "packaged:smollm2-135m-instruct"
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=2)
PROMPTS = ("What is the capital of France?", "Name a colour.", "How many legs has a spider?")
SIZE = 0.4
SETTLED = 20
"""Adapters after which memory is looked at: before, the engine still fills its caches."""


def drawn(model: LanguageModel, number: int) -> Adapter:
    """An adapter whose update is not zero."""
    generator = torch.Generator().manual_seed(number)
    fresh = model.fresh_adapter(np.random.default_rng(number))
    return {
        key: SIZE * torch.randn(value.shape, generator=generator) if "lora_B" in key else value
        for key, value in fresh.items()
    }


def first_logits(model: LanguageModel, adapter: Adapter, prompts: list[list[int]]) -> torch.Tensor:
    """Logits of the first token of each answer, (P, V)."""
    with model.holding(adapter) as held:
        return torch.stack([held(torch.tensor([ids])).logits[0, -1].float() for ids in prompts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LanguageModel(str(resolve_model(NAME)), lora=LoraConfig(), dtype=args.dtype, device="cpu", max_length=64)
    engine, process = EngineSpec("engine-0", NAME, args.dtype, 1, 0.0, 96, 8, 1, 1 << 28).build(""), psutil.Process()
    right = told = 0
    gaps = list[float]()
    memory = list[int]()
    before: torch.Tensor | None = None
    for number in range(args.rounds):
        adapter = drawn(model, number)
        request = model.engine_request(adapter, PROMPTS, GREEDY, np.random.default_rng(0))
        answers = engine.generate(request).answers
        logits = first_logits(model, adapter, [list(ids) for ids in request.prompts])
        for row, answer in enumerate(answers):
            tokens = answer[:1] or list(request.ends)

            def gap(logits: torch.Tensor) -> float:
                """How much less likely than the likeliest it is, in nats."""
                return float(logits[row].max() - logits[row, tokens].max())  # noqa: B023

            gaps.append(gap(logits))
            if before is not None and gap(before) != gaps[-1]:
                told += 1
                right += gaps[-1] < gap(before)
        before = logits
        memory.append(process.memory_info().rss)
    engine.close()
    settled = np.array(memory[SETTLED:]) / 2**20
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    asked = len(PROMPTS) * args.rounds
    result = {
        "dtype": args.dtype,
        "rounds": args.rounds,
        "answers": asked,
        "told": told,
        "right": right,
        "likeliest_by_transformers": sum(gap == 0 for gap in gaps),
        "median_gap_nats": round(float(np.median(gaps)), 3),
        "largest_gap_nats": round(max(gaps), 3),
        "memory_mib_first": round(float(settled[0]), 1),
        "memory_mib_last": round(float(settled[-1]), 1),
        "memory_mib_a_round": round(slope, 4),
        "memory_percent_over_all_rounds": round(100 * slope * len(settled) / float(settled[0]), 2),
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }
    (HERE / f"soak_{args.dtype}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()
