"""Does the engine stay what it is? 200 adapters are handed over one after the other, each is asked a few questions, and
after each of them its memory is read.

    OMP_NUM_THREADS=1 python experiments/benchmarks/vllm/soak.py

Adapters are drawn at random and large, so that each answers otherwise than the others. An answer is right if its first
token is, by transformers with the same adapter in float32, as likely as the likeliest but for rounding (`TOLERANCE`
nats). What the adapter before it would have answered is looked up, too: where that is another token, the engine can
only be right by the new adapter.
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
SPEC = EngineSpec("engine-0", NAME, "bfloat16", 1, 0.0, 96, 8, 1, 1 << 28)
TOLERANCE, SIZE = 0.5, 0.02
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LanguageModel(str(resolve_model(NAME)), lora=LoraConfig(), dtype="float32", device="cpu", max_length=64)
    engine, process = SPEC.build(""), psutil.Process()
    right = tells = 0
    memory, before = list[int](), None
    for number in range(args.rounds):
        adapter = drawn(model, number)
        request = model.engine_request(adapter, PROMPTS, GREEDY, np.random.default_rng(0))
        answers = engine.generate(request).answers
        logits = first_logits(model, adapter, [list(ids) for ids in request.prompts])
        best = logits.max(dim=1).values
        for row, answer in enumerate(answers):
            ended = not answer
            near = [logits[row, token] for token in (request.ends if ended else answer[:1])]
            right += bool(max(near) >= best[row] - TOLERANCE)
            tells += before is not None and bool(before[row] != logits[row].argmax())
        before = logits.argmax(dim=1)
        memory.append(process.memory_info().rss)
    engine.close()
    settled = np.array(memory[SETTLED:]) / 2**20
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    asked = len(PROMPTS) * args.rounds
    result = {
        "rounds": args.rounds,
        "answers": asked,
        "right": right,
        "where_the_adapter_before_would_have_said_otherwise": tells,
        "memory_mib_first": round(float(settled[0]), 1),
        "memory_mib_last": round(float(settled[-1]), 1),
        "memory_mib_a_round": round(slope, 4),
        "memory_percent_over_all_rounds": round(100 * slope * len(settled) / float(settled[0]), 2),
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }
    (HERE / "soak.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()
