"""Time and memory of forming a consensus. Writes results.json beside this file.

    python experiments/benchmarks/consensus/run.py

speed     1,000 clients x 1,000 prompts x 384 dimensions, float32, in memory (1.5 GB). Each rule is compared with
reading
          the same memory twice, which a medoid must do unless it finds the data in the cache.
defended  the same shape, where 30% of the clients send one text: the medoid with its defence, against the medoid.
mapped    10,000 clients x 1,000 prompts in one call, on a memory-mapped file larger than the memory it may use.
streamed  the same answers, made and passed on 20 prompts at a time: the process never holds more of them.

Every case runs in a fresh process; memory cases may allocate 4 GiB at most (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from semcons_ray.consensus import Consensus, Election, Facts, form_consensus
from semcons_ray.metering.environment import describe_environment

DIMENSION = 384
SPEED_SHAPE = (1000, 1000)  # prompts, clients
MEMORY_SHAPE = (1000, 10_000)
MEMORY_LIMIT = 4 * 2**30
SLAB = 20  # prompts made at a time
REPETITIONS = 15
RULES_REPETITIONS = 5
# These compare all pairs: they run on this many prompts, compared with reading those twice.
PAIRWISE = ("plurality", "multi_krum")
PAIRWISE_PROMPTS = 100
COLLUDING = 0.3
"""Share of the clients that send one text in the defended case."""
PER_PROMPT = ("medoid", "weighted_medoid", "geometric_median", "trimmed", "random_client", "longest")


def answers(prompts: range, num_clients: int) -> Tensor:
    """Unit vectors that lie around one centre for each prompt, as answers to a prompt do; the same for every caller."""
    made = torch.empty(len(prompts), num_clients, DIMENSION)
    for row, prompt in zip(made, prompts, strict=True):
        generator = torch.Generator().manual_seed(prompt)
        row.normal_(generator=generator).add_(torch.randn(DIMENSION, generator=generator))
        row.div_(torch.linalg.vector_norm(row, dim=1, keepdim=True))
    return made


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_twice(embeddings: Tensor) -> None:
    embeddings.sum()
    embeddings.sum()


def speed() -> dict[str, Any]:
    prompts, clients = SPEED_SHAPE
    embeddings = answers(range(prompts), clients)
    found: dict[str, Any] = {"shape": [prompts, clients, DIMENSION], "bytes": embeddings.nbytes, "rules": {}}
    for rule in PER_PROMPT + PAIRWISE:
        part = embeddings[:PAIRWISE_PROMPTS] if rule in PAIRWISE else embeddings
        consensus(part[:1], rule)  # the first call sets kernels up, and is not counted
        # In turns, so that whatever slows the machine down for a while slows both.
        reading, forming = [], []
        for _ in range(REPETITIONS if rule == "medoid" else RULES_REPETITIONS):
            reading.append(seconds(lambda part=part: read_twice(part)))
            forming.append(seconds(lambda part=part, rule=rule: consensus(part, rule)))
        found["rules"][rule] = {
            "prompts": len(part),
            "seconds": median(forming),
            "seconds_of_reading_twice": median(reading),
            "ratio": median(forming) / median(reading),
            "all_ratios": [round(a / b, 3) for a, b in zip(forming, reading, strict=True)],
        }
    found["load_average"] = os.getloadavg()[0]  # above `threads`, the machine was busy with something else, too
    return found


def consensus(embeddings: Tensor, rule: str) -> Tensor:
    prompts, clients, _ = embeddings.shape
    lengths = torch.arange(clients).expand(prompts, clients)
    return form(embeddings, Election(rule), weights=torch.arange(1.0, clients + 1), lengths=lengths).winner


def form(embeddings: Tensor, election: Election, **more: Tensor) -> Consensus:
    present = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    priority = torch.rand(present.shape, generator=torch.Generator().manual_seed(0))
    return form_consensus(embeddings, present, election, priority, Facts(**more))


def defended() -> dict[str, Any]:
    """The medoid with the defence, in turns with the plain one, where some of the clients send one text."""
    prompts, clients = SPEED_SHAPE
    embeddings = answers(range(prompts), clients)
    honest = clients - round(COLLUDING * clients)
    embeddings[:, honest:] = answers(range(prompts, prompts + 1), 1)
    asked = answers(range(prompts), 1)[:, 0]
    opinions = torch.arange(clients).clamp(max=honest).expand(prompts, clients)

    def with_defence() -> Consensus:
        return form(embeddings, Election(defence="independent"), prompts=asked, opinions=opinions)

    form(embeddings[:1], Election())  # the first call sets kernels up, and is not counted
    plain, guarded = [], []
    for _ in range(REPETITIONS):
        plain.append(seconds(lambda: form(embeddings, Election())))
        guarded.append(seconds(with_defence))
    timed = {
        "shape": [prompts, clients, DIMENSION],
        "seconds": median(guarded),
        "seconds_of_plain_medoid": median(plain),
        "ratio": median(guarded) / median(plain),
        "all_ratios": [round(a / b, 3) for a, b in zip(guarded, plain, strict=True)],
        "load_average": os.getloadavg()[0],
        "distrusted": int((with_defence().trust == 0).sum()),
    }
    taken = under_limit(lambda: with_defence().winner)
    return timed | {key: taken[key] for key in ("anonymous_bytes_before", "peak_anonymous_bytes", "limit_bytes")}


def mapped(path: Path) -> dict[str, Any]:
    prompts, clients = MEMORY_SHAPE
    size = prompts * clients * DIMENSION
    embeddings = torch.from_file(str(path), shared=True, size=size).view(prompts, clients, DIMENSION)
    return under_limit(lambda: consensus(embeddings, "medoid"))


def streamed() -> dict[str, Any]:
    prompts, clients = MEMORY_SHAPE
    return under_limit(
        lambda: torch.cat([consensus(answers(slab, clients), "medoid") for slab in slabs(range(prompts))])
    )


def slabs(prompts: range) -> Iterator[range]:
    for start in prompts[::SLAB]:
        yield prompts[start : start + SLAB]


def under_limit(work: Callable[[], Tensor]) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    before, peak, done = memory(), memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for key, value in memory().items():
                peak[key] = max(peak[key], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    winner = work()
    duration = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "shape": [*MEMORY_SHAPE, DIMENSION],
        "seconds": duration,
        "anonymous_bytes_before": before["RssAnon"],
        "peak_anonymous_bytes": peak["RssAnon"],
        "peak_file_mapped_bytes": peak["RssFile"],
        "peak_resident_bytes": memory()["VmHWM"],
        "limit_bytes": MEMORY_LIMIT,
        "winner_checksum": int((winner * torch.arange(1, len(winner) + 1)).sum()),
    }


def memory() -> dict[str, int]:
    """Memory of this process in bytes, by the names in /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {key[:-1]: int(rest[0]) * 1024 for key, *rest in lines if key in ("RssAnon:", "RssFile:", "VmHWM:")}


def write_file(path: Path) -> None:
    prompts, clients = MEMORY_SHAPE
    needed, free = 4 * prompts * clients * DIMENSION, shutil.disk_usage(path.parent).free
    if needed > 0.9 * free:
        sys.exit(f"{path.parent} has {free / 1e9:.0f} GB free; the mapped case needs {needed / 1e9:.0f}: --folder")
    with path.open("wb") as file:
        for slab in slabs(range(prompts)):
            answers(slab, clients).numpy().tofile(file)


def fresh_process(case: str, threads: int, *more: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--threads", str(threads), *more]
    print(case, "with", threads, "threads", file=sys.stderr, flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    return {"threads": threads, **result}


def run_all(folder: str | None, threads: int) -> None:
    results: dict[str, Any] = {
        "environment": describe_environment(),
        "device": "cpu",
        "speed": [fresh_process("speed", count) for count in sorted({1, threads})],
        "defended": [fresh_process("defended", count) for count in sorted({1, threads})],
        "streamed": fresh_process("streamed", threads),
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "embeddings.bin"
        write_file(path)
        results["mapped"] = fresh_process("mapped", threads, "--file", str(path))
    (Path(__file__).parent / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="Folder for 15 GB of temporary files; by default the system's.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", choices=["speed", "defended", "mapped", "streamed"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": speed,
        "defended": defended,
        "mapped": lambda: mapped(arguments.file),
        "streamed": streamed,
    }
    if arguments.case:
        print(json.dumps(cases[arguments.case]()))
    else:
        run_all(arguments.folder, arguments.threads)


if __name__ == "__main__":
    main()
