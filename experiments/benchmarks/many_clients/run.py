"""200 clients of a tiny Llama over 20 rounds, on two workers: memory of every process, and what is left after the run.

    python experiments/benchmarks/many_clients/run.py [--clients 200] [--rounds 20] [--out DIR]

The run is the `semcons` command in a process of its own. Once a second, the memory of that process and of all its
descendants is read from /proc, so Linux is needed: resident (RSS), proportional (PSS, pages that processes share count
once) and private (USS). A process's slope is that of a straight line fitted to its samples from round 5 on,
in percent of its mean per round. Processes that the run started have a variable in their environment, by which they are
found after the run, whatever their parent is by then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pynvml
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from semcons_ray.metering.environment import describe_environment

HERE = Path(__file__).parent
MIB = 1 << 20
FLAT_FROM_ROUND = 5
FLAT_PERCENT = 1.0
SAMPLE_SECONDS = 1.0
EXIT_SECONDS = 10.0
MARK = "SEMCONS_MANY_CLIENTS"
KINDS = ("rss", "pss", "uss")
COLOURS = ["red", "orange", "yellow", "green", "blue", "indigo", "violet", "black", "white", "grey"]
THINGS = ["house", "river", "mountain", "boat", "lantern", "garden", "window", "bridge", "harbour", "candle"]
VERBS = ["paint", "find", "carry", "draw", "remember", "build", "describe", "sell", "repair", "photograph"]


def questions() -> list[dict[str, str]]:
    """1,000 questions of 20 to 40 tokens, with answers."""
    return [
        {"prompt": f"how do you {verb} a {colour} {thing}?", "response": f"{verb} it as any {thing} that is {colour}"}
        for verb in VERBS
        for colour in COLOURS
        for thing in THINGS
    ]


def write_model(folder: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer trained on the questions."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + " " + row["response"] for row in questions()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(fast),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)


def write_config(folder: Path, clients: int, rounds: int) -> Path:
    """Write everything that the run needs into `folder`."""
    write_model(folder / "model")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")
    config = {
        "name": "many clients",
        "num_rounds": rounds,
        "clients": {"num_clients": clients},
        "data": {"source": str(data), "examples_per_client": 4, "num_test": 8, "partition": "iid"},
        "prompts": {"budget": 4, "selection": "random"},
        "model": {"name": str(folder / "model"), "max_length": 64},
        "training": {"batch_size": 8},
        "generation": {"max_new_tokens": 6},
        "evaluation": {"every": 10, "num_answers": 4},
        "resources": {"fleet": "ray", "max_workers": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def title(process: psutil.Process) -> str:
    """The purpose of a process: driver, WorkerActor, ServerActor, raylet, gcs_server and so on."""
    words = process.cmdline()
    if not words:
        return "?"
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0].split("(")[0]
    script = next((word for word in words if word.endswith(".py")), words[0])
    return Path(script).stem


def memory(pid: int) -> dict[str, int]:
    """Memory of a process in bytes, by kind."""
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        key, kib, _ = line.split()
        fields[key] = int(kib) << 10
    private = fields["Private_Clean:"] + fields["Private_Dirty:"]
    return {"rss": fields["Rss:"], "pss": fields["Pss:"], "uss": private}


def sample(driver: psutil.Process, rows: list[dict[str, Any]]) -> None:
    now = time.time()
    try:
        alive = [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in alive:
        try:
            name = "driver" if process.pid == driver.pid else title(process)
            rows.append({"time": now, "pid": process.pid, "name": name, **memory(process.pid)})
        except (psutil.Error, OSError, KeyError, ValueError):
            continue  # it ended meanwhile


def marked(mark: str) -> list[str]:
    """Running processes that have `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {title(process)}")
        except (psutil.Error, OSError):
            continue
    return found


def gpu_bytes() -> int | None:
    """Memory in use on all GPUs; None where there is none."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles)
    except pynvml.NVMLError:
        return None


def round_of(times: pd.Series, rounds: pd.DataFrame) -> np.ndarray:
    """Time as rounds: 5.5 is the middle of round 5; NaN before round 0 and after the last."""
    starts = [*rounds.started_at, rounds.started_at.iloc[-1] + rounds.duration_seconds.iloc[-1]]
    return np.interp(times, starts, [*rounds["round"], rounds["round"].iloc[-1] + 1], left=np.nan, right=np.nan)


def slopes(samples: pd.DataFrame, last_round: int) -> list[dict[str, Any]]:
    """An entry for each process that ran from `FLAT_FROM_ROUND` to the last round."""
    found = []
    late = samples[samples["round"] >= FLAT_FROM_ROUND]
    for pid, own in late.groupby("pid"):
        if own["round"].min() > FLAT_FROM_ROUND + 1 or own["round"].max() < last_round:
            continue
        entry: dict[str, Any] = {"process": own.name.mode()[0], "pid": int(pid)}
        for kind in KINDS:
            slope = np.polyfit(own["round"], own[kind], 1)[0]
            entry[f"{kind}_mib"] = round(float(own[kind].mean()) / MIB, 1)
            entry[f"{kind}_percent_a_round"] = round(100 * float(slope / own[kind].mean()), 3)
        found.append(entry)
    return sorted(found, key=lambda entry: -entry["rss_mib"])


def run(clients: int, rounds: int, scratch: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    config = write_config(scratch, clients, rounds)
    mark, out = uuid.uuid4().hex, scratch / "run"
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "run", str(config), "--out", str(out)]
    rows: list[dict[str, Any]] = []
    gpu_before, began = gpu_bytes(), time.time()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, MARK: mark}) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            sample(driver, rows)
            time.sleep(SAMPLE_SECONDS)
    seconds = time.time() - began
    started = {row["pid"] for row in rows}
    deadline = time.monotonic() + EXIT_SECONDS  # Ray's own processes take a moment to go
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    after_seconds = EXIT_SECONDS - (deadline - time.monotonic())
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    table = pd.read_parquet(out / "rounds.parquet")
    samples = pd.DataFrame(rows)
    samples["round"] = round_of(samples["time"], table)
    processes = slopes(samples, rounds)
    gpu_after = gpu_bytes()
    return {
        "clients": clients,
        "rounds": rounds,
        "seconds": round(seconds, 1),
        "round_seconds": [round(value, 2) for value in table.duration_seconds],
        "visits_answered": int(table.num_answered[1:].sum()),
        "num_lost": int(((table.lost != "") & (table["round"] > 0)).sum()),
        "processes": processes,
        "largest_rss_slope_percent_a_round": max(entry["rss_percent_a_round"] for entry in processes),
        "largest_uss_slope_percent_a_round": max(entry["uss_percent_a_round"] for entry in processes),
        "flat": all(entry[f"{kind}_percent_a_round"] < FLAT_PERCENT for entry in processes for kind in KINDS),
        "processes_seen": len(started),
        "left_after_exit": left,
        "seconds_until_all_gone": round(after_seconds, 1),
        "gpu_bytes_left": None if gpu_before is None or gpu_after is None else gpu_after - gpu_before,
        "load_average": os.getloadavg()[1],
        "environment": describe_environment(),
    }, samples


def by_round(samples: pd.DataFrame, processes: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean memory in MiB, in each round, of each process that ran to the end."""
    lasting = samples[samples.pid.isin([entry["pid"] for entry in processes]) & samples["round"].notna()]
    names = {entry["pid"]: entry["process"] for entry in processes}
    groups = lasting.groupby([lasting["round"].astype(int), "pid"])[list(KINDS)].mean() / MIB
    table = groups.round(1).reset_index()
    table.insert(1, "process", table.pid.map(names))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE, help="Folder for results.json and memory.csv.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result, samples = run(arguments.clients, arguments.rounds, Path(scratch))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    by_round(samples, result["processes"]).to_csv(arguments.out / "memory.csv", index=False)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))
    sys.exit(0 if result["flat"] and not result["left_after_exit"] else 1)


if __name__ == "__main__":
    main()
