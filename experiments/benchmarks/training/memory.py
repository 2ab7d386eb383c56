"""Memory of training on a CPU, as it is planned before anything is loaded and as it is measured, for six families.

    OMP_NUM_THREADS=1 python experiments/benchmarks/training/memory.py [--out DIR]

Models with random weights in one small shape, in bfloat16, and steps over full rows of two lengths. Each point is
measured in a process of its own, with a worker's environment: first the most memory that the system noted for it
(VmHWM) over a few steps, and then the most bytes of tensors that were alive in a step. Writes memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live_bytes import LiveBytes
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from semcons_ray.config import LoraConfig, TrainingConfig
from semcons_ray.distributed.cluster import FLAT_MEMORY
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.footprint import measure_footprint
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model

HERE = Path(__file__).parent
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma3_text"), SHAPE),
}
LENGTHS, ROWS, STEPS = (128, 512), 4, 4


def write_model(family: str, folder: Path) -> Path:
    """A model of the family with random weights, and SmolLM2's tokenizer."""
    words = AutoTokenizer.from_pretrained(resolve_model("packaged:smollm2-135m-instruct"))
    config = AutoConfig.for_model(
        family,
        **FAMILIES[family],
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def measured(folder: Path, length: int) -> dict[str, int]:
    """Bytes of this process and of tensors, planned and taken, over steps of `ROWS` rows of `length` tokens."""
    planned = measure_footprint(
        folder, dtype="bfloat16", max_length=length, batch_size=ROWS, generation_batch_size=1, max_new_tokens=1
    )
    model = LanguageModel(str(folder), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=length)
    rows = [Pair("about " * length, "after " * length)] * ROWS  # which are cut to full rows

    def train(steps: int) -> None:
        training = TrainingConfig(batch_size=ROWS, local_steps=steps)
        model.fine_tune(model.fresh_adapter(), rows, training, np.random.default_rng(0))

    train(STEPS)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    taken = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    with LiveBytes() as live:
        train(1)
    return {
        "planned_alive": planned.activations + planned.logits + planned.training_state,
        "alive": live.peak,
        "planned_process": planned.host_bytes,
        "process": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="Folder for memory.json.")
    parser.add_argument("--point", nargs=2, metavar=("FOLDER", "LENGTH"), help="Measure this in this process.")
    arguments = parser.parse_args()
    if arguments.point:
        folder, length = arguments.point
        print(json.dumps(measured(Path(folder), int(length))))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as beside:
        for family in FAMILIES:
            folder = write_model(family, Path(beside) / family)
            for length in LENGTHS:
                command = [sys.executable, __file__, "--point", str(folder), str(length)]
                told = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **FLAT_MEMORY}
                )
                found[f"{family}, {ROWS} x {length}"] = entry = json.loads(told.stdout)
                for what in ("alive", "process"):
                    entry[f"{what}_ratio"] = round(entry[f"planned_{what}"] / entry[what], 2)
                print(family, length, entry, flush=True)
    result = {"points": found, "environment": describe_environment()}
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
