"""Dry runs for a machine that is not here: which client would be where, and what of each card's memory is for what.

    python experiments/gpu/plans.py [--out DIR]

16 clients of Llama 3.1 8B's shape on 8 cards, once with a card for each worker and once with half a one; and 4 clients
of Llama 3.1 70B's shape, whose model is divided among all 8 (ZeRO-3).

All are planned by what `semcons run --dry-run` calls, for one declared node. The models are there as far as a plan
reads them: config.json, names and shapes of weights over a hole in the disk, and SmolLM2's tokenizer. Settings are
those of the preset gpu-8b, but for what is in `PLANS`. Writes plans.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from shapes import SMOLLM2, write_hollow
from transformers import AutoTokenizer

from semcons_ray.api.cost import SHAPES
from semcons_ray.commands.init import PRESETS
from semcons_ray.config import load_config
from semcons_ray.distributed.placement import GIB, Node
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.runs.assembly import count_parameters
from semcons_ray.runs.experiment import plan_experiment
from semcons_ray.runs.observers import Observer

HERE = Path(__file__).parent
HEAD_WIDTH = 128
NODE = Node(
    node_id="declared",
    name="8 x H100",
    cpus=96,
    gpus=(1.0,) * 8,
    memory_bytes=1024 * GIB,
    gpu_memory_bytes=81559 << 20,
    gpu_watts=700.0,
    cpu_bfloat16=True,
)
"""One machine with 96 cores, 1 TiB and eight NVIDIA H100 SXM of 80 GB, of which their driver says 81,559 MiB."""

PLANS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "8b, a card a worker": ("llama-3.1-8b", 1, {"clients": {"num_clients": 16}}),
    "8b, half a card a worker": (
        "llama-3.1-8b", 1, {"clients": {"num_clients": 16}, "resources": {"gpus_per_worker": 0.5}},
    ),
    "70b on eight cards": (
        "llama-3.1-70b", 8,
        {"clients": {"num_clients": 4}, "training": {"batch_size": 8, "gradient_accumulation_steps": 2}},
    ),
}  # fmt: skip
"""By name, the shape of the model, the cards that one takes, and settings over those of the preset. A batch of the
large model has a row for each card."""


def write_model(name: str, folder: Path) -> Path:
    """A Llama of the shape `name`, without weights, under its name."""
    shape = SHAPES[name]
    AutoTokenizer.from_pretrained(resolve_model(SMOLLM2)).save_pretrained(folder / name)
    return write_hollow(
        folder / name, "llama", hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.queries // HEAD_WIDTH,
        num_key_value_heads=shape.keys // HEAD_WIDTH, head_dim=HEAD_WIDTH, vocab_size=shape.vocabulary,
        max_position_embeddings=131072, tie_word_embeddings=shape.embeddings == 1,
    )  # fmt: skip


def plan(name: str, folder: Path) -> dict[str, Any]:
    """Where the clients would run, and the bytes of each card that a worker or a rank takes."""
    shape, ranks, settings = PLANS[name]
    model = str(write_model(shape, folder))
    fixed: dict[str, Any] = {
        "model": {"name": model, "chat_template_kwargs": {}},
        "sharding": {"models": {model: ranks} if ranks > 1 else {}},
        "resources": {"device": "cuda"},
    }
    placement = plan_experiment(load_config([PRESETS["gpu-8b"], fixed, settings]), Observer(), (NODE,)).placement
    need = placement.demands[model]
    return {
        "parameters": count_parameters(Path(model)),
        "workers": [
            {"name": worker.name, "clients": [*worker.clients], "cards": worker.ranks * worker.gpus,
             "host_bytes": worker.memory_bytes}
            for worker in placement.workers
        ],
        "card_bytes": dict(need.parts),
        "card_total_bytes": need.device_bytes,
        "card_limit_bytes": int(NODE.gpu_memory_bytes * placement.workers[0].gpus),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="Folder for plans.json.")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as beside:
        plans = {name: plan(name, Path(beside)) for name in PLANS}
    (out / "plans.json").write_text(json.dumps(plans, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(plans, indent=2))


if __name__ == "__main__":
    main()
