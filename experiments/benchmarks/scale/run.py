"""Many clients, and many of which few take part: what a round costs, and what the driver holds.

    python experiments/benchmarks/scale/run.py clients [--sizes 500 10000] [--rounds 5]
    python experiments/benchmarks/scale/run.py registered [--sizes 1000 1000000] [--rounds 20]
    python experiments/benchmarks/scale/run.py server [--sizes 2000]
    python experiments/benchmarks/scale/run.py report [--sizes 2000] [--rounds 20]
    python experiments/benchmarks/scale/run.py rounds [--sizes 100] [--rounds 1000]

Each run is `semcons run` in a process of its own: clients of a random Llama of two layers on two Ray workers, and a
server whose embedder is `TrigramEmbedder`, since a model of sentences would take longer than all clients together. The
driver's memory is the highest that the system noted for it (VmHWM). `server` is the server alone, in this process and
with the default model of sentences; it gets 1,000 answers of each client, of 5,000 different texts. `report` is a
page with many clients that were all measured in all rounds: a run of 20, each of which is there many times over with
answers of its own. Pages are opened in Chromium where it is installed. `rounds` commits made-up rounds of clients that
are all measured, and copies each to a URL (in memory): what the last rounds cost beside those from round 10 on, in
seconds of a CPU. Results are added to results.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from browser import opening
from torch import Tensor

from semcons_ray.config import DEFAULTS, validate_config
from semcons_ray.consensus import Election
from semcons_ray.federation.server import ServerSpec
from semcons_ray.messages import Answers
from semcons_ray.metering.environment import describe_environment
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.reporting import write_report
from semcons_ray.reporting.tables import busy_share, read_ledger
from semcons_ray.runs.assembly import embedder_of
from semcons_ray.runs.remote_folder import RemoteFolder
from semcons_ray.runs.run_folder import Commit, MetricsRow, RoundRow, RunFolder

HERE = Path(__file__).parent
TAKING_PART = 100
DIMENSION = 384
NUM_PROMPTS, NUM_TEXTS = 1_000, 5_000
RUN_FOR_REPORT = 20
"""Clients of the run of which a large report is made."""
SIZES = {
    **{"clients": [500, 10_000], "registered": [1_000, 1_000_000], "server": [2_000], "report": [2_000]},
    "rounds": [100],
}
ROUNDS = {"clients": 5, "registered": 20, "report": 20, "rounds": 1_000}
COMPARED = 20
"""Rounds of which medians are compared: as many from round 10 on, and at the end."""


class TrigramEmbedder:
    """How often each group of three letters is in a text, by a hash of it."""

    dimension = DIMENSION

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, (N, D) float32."""
        vectors = torch.zeros(len(texts), DIMENSION)
        for row, text in enumerate(texts):
            padded = f"  {text}  "
            for start in range(len(padded) - 2):
                vectors[row, zlib.crc32(padded[start : start + 3].encode()) % DIMENSION] += 1
        return torch.nn.functional.normalize(vectors, dim=1)


def many_clients() -> Any:
    """The benchmark beside this one, which makes the model."""
    spec = importlib.util.spec_from_file_location("many_clients", HERE.parent / "many_clients" / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_config(folder: Path, kind: str, size: int, rounds: int) -> Path:
    """Write everything that a run needs."""
    many_clients().write_model(folder / "model")
    examples = 4 if kind == "clients" else 1
    data = folder / "questions.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for number in range(size * examples + 200):
            row = {"prompt": f"how do you paint house {number}?", "response": f"paint it as house {number % 100}"}
            file.write(json.dumps(row) + "\n")
    config = {
        "name": f"{size} {kind}",
        "num_rounds": rounds,
        "clients": {"num_clients": size} | ({"participation": TAKING_PART / size} if kind == "registered" else {}),
        "data": {"source": str(data), "examples_per_client": examples, "num_test": 8, "partition": "iid"},
        "prompts": {"budget": 64, "selection": "random"},
        "model": {"name": str(folder / "model"), "max_length": 48},
        "training": {"batch_size": 8, "local_steps": 1},
        "generation": {"max_new_tokens": 6, "batch_size": 64},
        "server": {"embedder": "run:TrigramEmbedder"},
        "evaluation": {"every": rounds, "num_answers": 0},
        "resources": {"fleet": "ray", "max_workers": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def high_water(pid: int) -> int:
    """Most memory that a process has had, in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def run(kind: str, size: int, rounds: int, scratch: Path) -> dict[str, Any]:
    config, out = write_config(scratch, kind, size, rounds), scratch / "run"
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "run", str(config), "--out", str(out)]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    began, most, server = time.time(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}) as process:
        while process.poll() is None:
            most = max(most, high_water(process.pid))
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                if "ServerActor" in child.name():
                    server = max(server, high_water(child.pid))
            time.sleep(1)
    ended = time.time()
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    table, ledger = pd.read_parquet(out / "rounds.parquet"), pd.read_parquet(out / "ledger.parquet")
    later = table[table["round"] > 0]
    steady = ledger[ledger["round"].isin(later["round"][later["round"] < rounds])]  # the last round evaluates
    busy = busy_share(steady)
    last = later.iloc[-1]
    return {
        "kind": kind,
        "size": size,
        "rounds": rounds,
        "seconds": round(ended - began, 1),
        "ready_seconds": round(float(table.started_at[table["round"] == 1].iloc[0]) - began, 1),
        "round_seconds": [round(value, 2) for value in later.duration_seconds],
        "num_answered": later.num_answered.tolist(),
        "busy_share_of_workers": {name: round(float(share), 4) for name, share in busy.items() if "worker" in name},
        "end_seconds": round(ended - float(last.started_at + last.duration_seconds), 1),
        "driver_peak_bytes": most,
        "server_peak_bytes": server,
        **opening(out / "report.html"),
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }


def run_report(size: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """The report of `size` clients that were all measured in all rounds."""
    config, out = write_config(scratch, "clients", RUN_FOR_REPORT, rounds), scratch / "run"
    every = ["--evaluation.every", "1", "--evaluation.num_answers", "4", "--resources.fleet", "local"]
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "run", str(config), *every, "--out", str(out)]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})
    repeat_clients(out, size // RUN_FOR_REPORT)
    began = time.time()
    page = write_report(out)
    return {
        "kind": "report",
        "size": size,
        "rounds": rounds,
        "write_seconds": round(time.time() - began, 1),
        **opening(page),
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }


def repeat_clients(out: Path, times: int) -> None:
    """Put each client of a run into its tables `times` times, with ids and answers of its own; one of them won."""
    settings = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    count = settings["clients"]["num_clients"]
    settings["clients"]["num_clients"] = times * count
    (out / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for path in [path for path in out.rglob("*.parquet") if path.is_file()]:
        table = pd.read_parquet(path)
        if "client_id" not in table:
            continue
        of_clients, copies = table[table["client_id"] >= 0], [table]
        for copy in range(1, times):
            more = {"client_id": of_clients["client_id"] + copy * count}
            if "chosen" in of_clients:
                more |= {"chosen": False, "answer": of_clients["answer"] + f" {copy}"}
            copies.append(of_clients.assign(**more))
        pd.concat(copies).to_parquet(path, index=False)


def made_up(round: int, size: int) -> Commit:
    """A round of `size` clients that were all asked, heard and measured."""
    random = np.random.default_rng(round)
    summary = RoundRow(
        round=round, started_at=60.0 * round, duration_seconds=60.0, num_participants=size, num_answered=size, lost="",
        failures="", num_labels=64, mean_agreement=0.5, label_churn=0.25,
    )  # fmt: skip
    metrics = tuple(
        MetricsRow(
            round=round, client_id=client, model="org/a", nll=nll, perplexity=float(np.exp(nll)), bits_per_byte=nll / 3,
            rouge_l=0.5, similarity=0.5, train_loss=nll, num_private=4, num_pseudo_labels=64, others={"f1": nll / 4},
        )
        for client, nll in enumerate(random.random(size).tolist())
    )  # fmt: skip
    ledger = tuple(
        LedgerRow(
            round=round, client_id=client, worker="worker-0", node="here", stage=stage, started_at=60.0 * round + took,
            duration_seconds=took, tokens=64, uplink_bytes=100, energy_joules=took, energy_source="estimated",
        )
        for client in range(size)
        for stage, took in zip(("fine_tune", "generate", "encode", "evaluate"), random.random(4).tolist(), strict=True)
    )  # fmt: skip
    return Commit(summary=summary, metrics=metrics, ledger=ledger)


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of each file."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def run_rounds(size: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Commit and copy `rounds` rounds of `size` clients."""
    os.environ["SEMCONS_CACHE"] = str(scratch)
    remote = RemoteFolder("memory://bucket/run")
    config = validate_config({"num_rounds": rounds, "clients": {"num_clients": size}}, where="rounds")
    folder = RunFolder.create(remote.folder, config)
    costs: dict[str, list[float]] = {"commit_seconds": [], "copy_seconds": [], "written_bytes": []}
    compared = {*range(10, 10 + COMPARED), *range(rounds + 1 - COMPARED, rounds + 1)}
    for number in range(rounds + 1):
        before = stamps(folder.path) if number in compared else {}
        commit, began = made_up(number, size), time.process_time()
        folder.commit(commit, b"state")
        committed = time.process_time()
        remote.copy()
        if number in compared:
            costs["commit_seconds"].append(committed - began)
            costs["copy_seconds"].append(time.process_time() - committed)
            written = [stamp[0] for path, stamp in stamps(folder.path).items() if before.get(path) != stamp]
            costs["written_bytes"].append(sum(written))
    first = {name: statistics.median(values[:COMPARED]) for name, values in costs.items()}
    last = {name: statistics.median(values[-COMPARED:]) for name, values in costs.items()}
    began = time.process_time()
    folder.write_tables(folder.commits())
    gathered = time.process_time()
    read_ledger(folder.path)
    return {
        "kind": "rounds",
        "size": size,
        "rounds": rounds,
        "from_round_10": {name: round(value, 4) for name, value in first.items()},
        "at_the_end": {name: round(value, 4) for name, value in last.items()},
        "ratio": {name: round(last[name] / first[name], 2) for name in costs},
        "resume_seconds": round(gathered - began, 1),
        "read_ledger_seconds": round(time.process_time() - gathered, 2),
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }


def run_server(size: int) -> dict[str, Any]:
    """One round of the server: `size` clients, `NUM_PROMPTS` prompts."""
    random = np.random.default_rng(0)
    texts = [f"the answer of number {number}, said in as many words as it takes" for number in range(NUM_TEXTS)]
    spec = ServerSpec(
        embedder="sentence_transformers", embedder_options=embedder_of(DEFAULTS, {})[1], device="cpu", threads=1,
        num_prompts=NUM_PROMPTS,
        election=Election(), prompts=(), known={}, seed=0,
    )  # fmt: skip
    server, began = spec.build(), time.time()
    loaded = high_water(os.getpid())
    server.begin(1, [*range(size)])
    for client in range(size):
        answers = tuple(texts[place] for place in random.integers(NUM_TEXTS, size=NUM_PROMPTS))
        message = Answers(round_number=1, client_id=client, num_examples=1, answers=answers)
        server.collect(client, message.encode())
    collected = time.time()
    verdict = server.conclude()
    concluded = time.time()
    return {
        "kind": "server",
        "size": size,
        "prompts": NUM_PROMPTS,
        "labels": len(verdict.labels.prompt_ids),
        "collect_seconds": round(collected - began, 1),
        "conclude_seconds": round(concluded - collected, 1),
        "loaded_bytes": loaded,
        "peak_bytes": high_water(os.getpid()),
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SIZES)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of clients")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json")
    args = parser.parse_args()
    sizes = args.sizes or SIZES[args.kind]
    path = args.out / "results.json"
    for size in sizes:
        if args.kind == "server":
            result = run_server(size)
        else:
            rounds = args.rounds or ROUNDS[args.kind]
            with tempfile.TemporaryDirectory() as scratch:
                if args.kind == "report":
                    result = run_report(size, rounds, Path(scratch))
                elif args.kind == "rounds":
                    result = run_rounds(size, rounds, Path(scratch))
                else:
                    result = run(args.kind, size, rounds, Path(scratch))
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        kept = [one for one in found if (one["kind"], one["size"]) != (args.kind, size)]
        path.write_text(json.dumps([*kept, result], indent=2) + "\n", encoding="utf-8")
        print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2), flush=True)


if __name__ == "__main__":
    main()
