"""What a GPU changes: the speed of a consensus, of clients that share a process, of workers that share a GPU, and
joules; memory and speed of training and answers, with SmolLM2 and with a billion weights.

    python experiments/gpu/run.py [--device auto|cpu|cuda] [--small] [--parts PART ...]

similarity  form_consensus (medoid) on the device, in turns with reading the same memory twice; also in other chunks.
devices     tokens/s of training and of answers at batches of 1, 8 and 32, from which a device's profile is calibrated.
memory      GPU memory that is planned for training, and taken, at several lengths and batches.
options     packed against padded training in real tokens/s; memory with accumulation and checkpointing.
tokens      tokens/s of 1 and of 8 clients of SmolLM2 in one process, training and generating; on a GPU also the joules
            of its NVML counter beside the estimate (busy seconds times the power limit).
large       a run of 4 clients of a model of a billion weights in one process: seconds, tokens/s, joules, memory.
placement   a run of 4 clients over Ray with `resources.gpus_per_worker: 0.25`; on a CPU with a core for each worker.

devices, memory, options and large have random weights in the shapes of SmolLM2-135M and Llama 3.2 1B: speed, memory and
joules don't depend on the weights. --small takes sizes that a CPU finishes in a minute or two. Writes results.json into
--out; parts that were measured there before with the same device and sizes stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clients import large, placement, tokens
from clocks import seconds
from rates import devices, memory, options

from semcons_ray.consensus import Election, Facts, form_consensus
from semcons_ray.metering.environment import describe_environment

HERE = Path(__file__).parent
DIMENSION = 384
REPETITIONS = 10
CHUNKS = (16, 32, 64, 1024)
PARTS = ("similarity", "devices", "memory", "options", "tokens", "large", "placement")


def similarity(device: str, small: bool) -> dict[str, Any]:
    prompts, clients = (100, 200) if small else (4000, 1000)
    generator = torch.Generator(device).manual_seed(0)
    embeddings = torch.randn(prompts, clients, DIMENSION, device=device, generator=generator)
    embeddings = torch.nn.functional.normalize(embeddings, dim=2)
    present = torch.ones(prompts, clients, dtype=torch.bool, device=device)
    priorities = torch.rand(prompts, clients, device=device, generator=generator)
    lengths = torch.ones(prompts, clients, dtype=torch.long, device=device)
    facts = Facts(weights=torch.ones(clients, device=device), lengths=lengths)

    def read_twice() -> None:
        embeddings.sum()
        embeddings.sum()

    def form(chunk_bytes: int | None = None) -> None:
        form_consensus(
            embeddings,
            present,
            Election("medoid"),
            priorities,
            facts,
            chunk_bytes=chunk_bytes,
        )

    def form_in_chunks(mebibytes: int) -> float:
        form(mebibytes << 20)
        return median(seconds(device, lambda: form(mebibytes << 20)) for _ in range(REPETITIONS))

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
        "seconds_by_mib_of_a_chunk": {size: form_in_chunks(size) for size in CHUNKS},
        "read_gb_per_second": 2 * embeddings.nbytes / median(reading) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--small", action="store_true", help="Sizes for a CPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", type=Path, help="Folder that keeps the random models; default: none does.")
    parser.add_argument("--tokenizer", help="Folder of their tokenizer; default: SmolLM2's.")
    parser.add_argument("--out", type=Path, default=HERE, help="Folder for results.json.")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    file, settings = arguments.out / "results.json", {"device": device, "small": arguments.small}
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if {key: result.get(key) for key in settings} != settings:
        result = dict(settings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as beside:
        models, tokenizer = arguments.models or Path(beside), arguments.tokenizer
        random = {
            part.__name__: partial(part, models=models, tokenizer=tokenizer)
            for part in (devices, memory, options, large)
        }
        parts = {"similarity": similarity, "tokens": tokens, "placement": placement, **random}
        for part in arguments.parts:
            print(part, flush=True)
            result[part] = parts[part](device, arguments.small)
            result["environment"] = describe_environment()
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(result[part], indent=2), flush=True)


if __name__ == "__main__":
    main()
