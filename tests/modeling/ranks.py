"""What a model does, whole or divided; run as a module, it is one rank: RANK STORE MODEL OUT."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semcons_ray.config import GenerationConfig, LoraConfig, ShardingConfig, TrainingConfig
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.language_model import LanguageModel, Pair, Parameters
from tests.tiny import examples

# 25 in batches of four: the last of an epoch has one row, and one rank none.
PAIRS = [Pair(row["prompt"], row["response"], weight=0.5 + i % 2) for i, row in enumerate(examples()[:25])]
SETTINGS: dict[str, Any] = {"lora": LoraConfig(rank=4), "dtype": "float32", "device": "cpu", "max_length": 64}
STEPS = 20
# What is compared, by name: the ZeRO stage, and what lies beside the plain settings.
CASES: dict[str, dict[str, Any]] = {
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "zero-2 offloaded": {"zero_stage": 2, "cpu_offload": True},
    "zero-3 offloaded": {"zero_stage": 3, "cpu_offload": True},
    "zero-3 with all that algorithms do": {"zero_stage": 3},
}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def measure(model: LanguageModel, case: str, out: Path) -> dict[str, Any]:
    """Train, score, answer and export; the same for a whole model and for a rank."""
    training = TrainingConfig(
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        batch_size=4,
        local_steps=STEPS,
        weight_decay=0.01,
        max_grad_norm=0.5,
    )
    adapter, extras = model.fresh_adapter(), {}
    optimizer: dict[str, torch.Tensor] = {}
    if "algorithms" in case:
        training = training.model_copy(update={"keep_optimizer": True})
        adapter = {key: value[:2] if "lora_A" in key else value[:, :2].clone() for key, value in adapter.items()}
        extras = {"adjust": pull_to_zero, "frozen": {key: value + 0.05 for key, value in model.fresh_adapter().items()}}
    losses: list[torch.Tensor] = []
    reduced = model._reduced

    def watched(total: torch.Tensor, masters: Parameters) -> float:
        losses.append(reduced(total, masters))
        return losses[-1]

    model._reduced = watched  # type: ignore[method-assign]
    tuned = model.fine_tune(adapter, PAIRS, training, rng(0), optimizer, **extras)
    model._reduced = reduced  # type: ignore[method-assign]
    if tuned.optimizer:  # go on with it
        tuned = model.fine_tune(adapter, PAIRS, training, rng(1), tuned.optimizer, **extras)
    greedy = GenerationConfig(max_new_tokens=20, temperature=0.0, batch_size=4)
    prompts = [pair.prompt for pair in PAIRS[:9]]
    frozen: Adapter | None = extras.get("frozen")
    out.mkdir(parents=True, exist_ok=True)
    model.export_adapter(adapter, out)
    return {
        "losses": [float(loss) for loss in losses],
        "loss": tuned.loss,
        "tokens": tuned.tokens,
        "adapter": adapter,
        "nll": tuple(model.negative_log_likelihood(adapter, PAIRS, 6, frozen=frozen)),  # plain, as torch.load takes it
        "answers": model.generate(adapter, prompts, greedy, rng(2), frozen=frozen),
        "drawn": model.generate(adapter, prompts, greedy.model_copy(update={"temperature": 1.0}), rng(3))[0],
    }


def pull_to_zero(parameters: Parameters) -> None:
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad += 0.1 * parameter


def main(rank: int, store: str, model: str, out: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from semcons_ray.modeling.sharded import ShardedLanguageModel

    results = {}
    for case, sharding in CASES.items():
        sharded = ShardedLanguageModel(model, sharding=ShardingConfig(**sharding), **SETTINGS)
        results[case] = {"held": [sharded.held_parameters()], **measure(sharded, case, out / case)}
        results[case]["held"].append(sharded.held_parameters())
    torch.save(results, out / f"rank-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
