"""32 clients of SmolLM2-135M on this machine: seconds until they are ready, peak memory, and one whole round.

    python experiments/benchmarks/packing/run.py

Memory is the proportional set size (PSS) of the driver and all its descendants, Ray's own processes included, sampled
twice a second: pages that processes share count once.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import psutil

from semcons_ray.config import validate_config
from semcons_ray.federation.fleet import Reply
from semcons_ray.metering.environment import describe_environment
from semcons_ray.runs.experiment import run_experiment
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.run_folder import Commit

HERE = Path(__file__).parent
GIB = 1 << 30
CONFIG = {
    "num_rounds": 1,
    "clients": {"num_clients": 32},
    "data": {"examples_per_client": 16, "num_test": 16},
    "prompts": {"budget": 16},
    "evaluation": {"num_answers": 4},
    "resources": {"memory_limit_gib": 5.0},
}


def tree_bytes() -> int:
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total


class Clock(Observer):
    """Records when clients are ready, and prints the progress."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ready_seconds = 0.0
        self.visits = 0

    def stage(self, text: str) -> None:
        print(f"{time.perf_counter() - self.began:6.1f} s  {text}", flush=True)

    def planned(self, text: str) -> None:
        print(text)

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        self.ready_seconds = self.ready_seconds or time.perf_counter() - self.began
        self.stage(f"round {round} begins: {num_participants} clients")

    def client_done(self, reply: Reply) -> None:
        self.visits += reply.round > 0

    def round_ends(self, commit: Commit) -> None:
        self.stage(f"round {commit.summary.round} ends")


def main() -> None:
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            peak[0] = max(peak[0], tree_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = Path(folder) / "run"
            run_experiment(validate_config(CONFIG, where=__file__), out, clock)
        finally:
            stop.set()
            watcher.join()
        metrics = pd.read_parquet(out / "metrics.parquet")
        workers = len(json.loads((out / "placement.json").read_text())["workers"])
    result = {
        "clients": 32,
        "workers": workers,
        "ready_seconds": round(clock.ready_seconds, 1),
        "peak_gib": round(peak[0] / GIB, 2),
        "round_seconds": round(time.perf_counter() - clock.began - clock.ready_seconds, 1),
        "visits": clock.visits,
        "clients_evaluated": int((metrics["round"] == 1).sum()),
        "cpus": os.cpu_count(),
        "environment": describe_environment(),
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print({key: value for key, value in result.items() if key != "environment"})


if __name__ == "__main__":
    main()
