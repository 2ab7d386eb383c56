"""Seconds and memory to read and divide a million rows, by kind of file, beside `datasets`.

    python experiments/benchmarks/reading/run.py [--rows 1000000]

Each file is read in a process of its own, whose highest memory is read at its end; what is left when the imports are
taken off is given beside. `datasets` only reads and builds its cache: it neither checks rows nor divides them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from semcons_ray.metering.environment import describe_environment

HERE = Path(__file__).parent
KINDS = ("jsonl", "jsonl.gz", "json", "csv", "parquet")
MIB = 1 << 20


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows in Alpaca's schema, with answers of 40 to 400 characters."""
    words = np.random.default_rng(0).integers(0, 5000, size=(count, 2))
    for number, (first, second) in enumerate(words.tolist()):
        answer = f"the answer to number {number} " * (2 + first % 12)
        yield {"instruction": f"Question {number} of word {first}?", "input": f"word {second}", "output": answer[:400]}


def write(folder: Path, count: int) -> None:
    table = list(rows(count))
    lines = "".join(json.dumps(row) + "\n" for row in table)
    (folder / "x.jsonl").write_text(lines)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    (folder / "x.json").write_text(json.dumps(table))
    frame = pd.DataFrame(table)
    frame.to_csv(folder / "x.csv", index=False)
    frame.to_parquet(folder / "x.parquet")


def read(file: str) -> dict[str, float]:
    """Read a file, and divide it among ten clients."""
    from semcons_ray.config import DataConfig, PromptsConfig
    from semcons_ray.data.sources import load_examples
    from semcons_ray.data.split import divide

    before = peak_mib()
    began = time.perf_counter()
    source = load_examples(file)
    loaded = time.perf_counter() - began
    data = DataConfig(partition="iid", num_test=1000, examples_per_client=len(source.examples) // 20)
    divide(source, data, PromptsConfig(budget=1000, selection="random"), num_clients=10, seed=0, embed=None)  # type: ignore[arg-type]
    return measured(before, began) | {"load_seconds": loaded, "rows": len(source.examples)}


def read_by_datasets(file: str) -> dict[str, float]:
    from datasets import load_dataset

    kind = {"jsonl": "json", "gz": "json"}.get(file.rsplit(".", 1)[-1], file.rsplit(".", 1)[-1])
    before = peak_mib()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        count = len(load_dataset(kind, data_files=file, split="train", cache_dir=cache))
    return measured(before, began) | {"rows": count}


def peak_mib() -> float:
    """Most memory that this process has had; getrusage would count that of the process which started it."""
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024 / MIB


def measured(before: float, began: float) -> dict[str, float]:
    seconds, peak = time.perf_counter() - began, peak_mib()
    return {"seconds": seconds, "peak_mib": peak, "without_imports_mib": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", nargs=2, metavar=("FUNCTION", "FILE"), help="used by the script itself")
    args = parser.parse_args()
    if args.read:
        function, file = args.read
        print(json.dumps({"ours": read, "datasets": read_by_datasets}[function](file)))
        return
    results: dict[str, Any] = {"environment": describe_environment(), "rows": args.rows, "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.rows)
        for kind in KINDS:
            file = Path(folder) / f"x.{kind}"
            entry: dict[str, Any] = {"mib": file.stat().st_size / MIB}
            for function in ("ours", "datasets"):
                command = [sys.executable, __file__, "--read", function, str(file)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                entry[function] = json.loads(done.stdout.splitlines()[-1])
            entry["times_datasets_seconds"] = entry["ours"]["seconds"] / entry["datasets"]["seconds"]
            results["files"][kind] = entry
            print(kind, entry)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
