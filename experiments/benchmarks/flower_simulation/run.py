"""The same FedAvg-LoRA job by this package and by Flower's simulation, in turn: wall time, rounds, and what is learnt.

    python experiments/benchmarks/flower_simulation/run.py --flower-python PATH [--repetitions 2]

Each side is a command in a process of its own, from its start to its end. Both get the same shares of the data, base
model, number type, batch sizes, processes and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from semcons_ray.config import ExperimentConfig, load_config
from semcons_ray.data.examples import Example
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.runs.assembly import prepare_data
from semcons_ray.runs.run_folder import RunFolder

HERE = Path(__file__).parent
JOB = HERE / "job.yaml"
PACKAGES = ["flwr", "ray", "torch", "transformers", "peft", "numpy"]


def write_job(config: ExperimentConfig, folder: Path) -> Path:
    """The job as Flower's side reads it, with the shares of the data that a run of ours has."""
    split = prepare_data(config, RunFolder.create(folder / "split", config))

    def rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
        return [{"prompt": example.prompt, "response": example.response} for example in examples]

    data, job = folder / "data.json", folder / "job.json"
    data.write_text(json.dumps({"private": [rows(share) for share in split.private], "test": rows(split.test)}))
    settings = {
        "model": resolve_model(config.model.name),
        "data": str(data),
        "rank": config.model.lora.rank,
        "alpha": config.model.lora.alpha,
        "learning_rate": config.training.learning_rate,
        "batch_size": config.training.batch_size,
        "eval_batch_size": config.generation.batch_size,
        "clients": config.clients.num_clients,
        "rounds": config.num_rounds,
        "workers": config.resources.max_workers,
        "threads": config.resources.threads_per_worker,
    }
    job.write_text(json.dumps(settings))
    return job


def timed(command: Sequence[str], threads: int) -> tuple[float, float]:
    """Run a command; returns when it began and when it ended (unix seconds)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return began, time.time()


def measured(span: tuple[float, float], ends: Sequence[float], nll: Sequence[float]) -> dict[str, Any]:
    """Seconds of a run and of its parts.

    Args:
        span: When it began and ended.
        ends: When each round was done, from round 0, the measurement of the base model.
        nll: NLL of the test set after each of them.
    """
    began, ended = span
    return {
        "wall_seconds": ended - began,
        "start_seconds": ends[0] - began,
        "round_seconds": [after - before for before, after in pairwise(ends)],
        "end_seconds": ended - ends[-1],
        "nll": [*nll],
    }


def ours(out: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "run", str(JOB), "--out", str(out)]
    span = timed(command, threads)
    rounds = pd.read_parquet(out / "rounds.parquet").sort_values("round")
    nll = pd.read_parquet(out / "metrics.parquet").groupby("round")["nll"].mean()
    return measured(span, [*(rounds["started_at"] + rounds["duration_seconds"])], [*nll])


def flower(python: str, job: Path, out: Path, threads: int) -> dict[str, Any]:
    span = timed([python, str(HERE / "simulate.py"), str(job), str(out)], threads)
    rounds = json.loads((out / "rounds.json").read_text())
    return measured(span, [row["ended_at"] for row in rounds], [row["nll"] for row in rounds])


def versions_of(python: str) -> dict[str, str]:
    """Versions of what Flower's side uses."""
    code = f"import json; from importlib.metadata import version; print(json.dumps([*map(version, {PACKAGES})]))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(PACKAGES, json.loads(done.stdout), strict=True))


def ratios(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Flower's seconds divided by ours: of whole runs, of what comes before round 1, and of rounds from the second."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}

    steady = [
        statistics.mean(pair["flower"]["round_seconds"][1:]) / statistics.mean(pair["ours"]["round_seconds"][1:])
        for pair in pairs
    ]
    whole, start = (
        [pair["flower"][key] / pair["ours"][key] for pair in pairs] for key in ("wall_seconds", "start_seconds")
    )
    return {"wall": spread(whole), "start": spread(start), "steady_round": spread(steady)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flower-python", required=True, help="python of an environment with flwr[simulation]")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    config = load_config(JOB)
    threads = config.resources.threads_per_worker
    versions = versions_of(args.flower_python)
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = write_job(config, folder)
        for repetition in range(args.repetitions):
            pair = {"ours": ours(folder / f"ours-{repetition}", threads)}
            pair["flower"] = flower(args.flower_python, job, folder / f"flower-{repetition}", threads)
            pairs.append(pair)
            result = {
                "flower_packages": versions,
                "flower_over_ours": ratios(pairs),
                "repetitions": pairs,
                "environment": describe_environment(),
            }
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(result["flower_over_ours"]), flush=True)


if __name__ == "__main__":
    main()
