"""Run folders made up from numbers, in the format that run_folder.py and experiment.py write."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.config import dump_config, validate_config
from semcons_ray.data.examples import Example
from semcons_ray.data.split import DataSplit, read_split, write_split

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> $\\frac{ & \"quoted\" é 漢字"


def write_run(
    folder: Path,
    *,
    num_clients: int = 3,
    num_rounds: int = 2,
    num_prompts: int = 5,
    models: tuple[str, ...] = ("org/tiny-model",),
    lost: dict[int, tuple[int, ...]] | None = None,
    energy_source: str = "estimated",
    local_only: bool = False,
    answer_last_round: bool = True,
    answer=lambda round, prompt, client: f"answer {client % 2} to {prompt}",
    settings: dict | None = None,
) -> Path:
    """A run whose numbers are simple to work out.

    Client c's NLL is 2 for the base and 2 - 0.1 * round * (c + 1) after, and its bits per byte are half of that, or a
    quarter for the second model; ROUGE-L is a tenth of the round; each visit of a round fine-tunes 2 s, generates 1 s
    and evaluates 0.5 s, sends 100 B + c up and takes 50 B down, at 10 W.
    Client (prompt + round) % C is chosen, unless it was lost; prompt 0 is abstained; prompt p agrees to p / P.
    """
    lost = lost or {}
    config = validate_config(
        {
            "num_rounds": num_rounds,
            "clients": {"num_clients": num_clients},
            "prompts": {"budget": num_prompts},
            "algorithm": {"name": "local_only"}
            if local_only
            else {"first_exchange": 1, "answer_last_round": answer_last_round},
            **(settings or {}),
        },
        where="test",
    )
    (folder / "consensus").mkdir(parents=True)
    model_of = [models[client % len(models)] for client in range(num_clients)]
    metrics, rounds, ledger = [], [], []
    clock = 1_700_000_000.0
    for round in range(num_rounds + 1):
        present = [client for client in range(num_clients) if client not in lost.get(round, ())]
        started_at = clock
        for client in present:
            start, worker = started_at, f"worker-{client}"
            row = metrics_row(round, client, model_of[client])
            metrics.append(row | {"bits_per_byte": row["nll"] / (4 if model_of[client] in models[1:2] else 2)})
            visit = {"fine_tune": 2.0, "generate": 1.0, "evaluate": 0.5} if round else {"load": 4.0}
            for stage, seconds in visit.items():
                ledger.append(
                    ledger_row(
                        round,
                        client,
                        worker,
                        stage,
                        start,
                        seconds,
                        energy_source,
                        uplink_bytes=100 + client if stage == "generate" and not local_only else 0,
                        downlink_bytes=50 if stage == "fine_tune" and not local_only else 0,
                    )
                )
                start += seconds
            ledger.append(ledger_row(round, -1, worker, "idle", started_at, 0.5 if round else 0.0, energy_source))
        clock += 4.0
        has_consensus = not local_only and round in config.algorithm.exchanges(num_rounds)
        if has_consensus:
            consensus = consensus_rows(round, num_prompts, num_clients, present, answer)
            pd.DataFrame(consensus).to_parquet(folder / f"consensus/round_{round:03d}.parquet", index=False)
        rounds.append(
            {
                "round": round,
                "started_at": started_at,
                "duration_seconds": 4.0,
                "num_participants": num_clients,
                "num_answered": len(present),
                "lost": ", ".join(map(str, lost.get(round, ()))),
                "failures": "; ".join(f"client {client}, round {round}: it died" for client in lost.get(round, ())),
                "num_labels": num_prompts - 1 if has_consensus else 0,
                "mean_agreement": (num_prompts - 1) / 2 / num_prompts if has_consensus else math.nan,
                "label_churn": 0.4 if has_consensus and round > 1 else math.nan,
                "distrusted": "",
            }
        )
    pd.DataFrame(metrics).to_parquet(folder / "metrics.parquet", index=False)
    pd.DataFrame(rounds).to_parquet(folder / "rounds.parquet", index=False)
    pd.DataFrame(ledger).to_parquet(folder / "ledger.parquet", index=False)
    write_split(split(num_prompts, num_clients), folder / "data.parquet")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "environment.json").write_text(
        json.dumps({"semcons_ray": "0", "python": "3.11.9", "cpu": "A CPU", "num_cpus": 2, "memory_gib": 8.0,
                    "packages": {"torch": "2.13.0"}, "gpus": []})
    )  # fmt: skip
    (folder / "placement.json").write_text(
        json.dumps(
            {
                "device": "cpu",
                "workers": [
                    {"name": f"worker-{client}", "node": "n0", "model": model_of[client], "clients": [client],
                     "threads": 1, "gpus": 0.0, "memory_bytes": 2**30}
                    for client in range(num_clients)
                ],
                "energy_meters": {"n0": "rapl" if energy_source == "measured" else ""},
            }
        )
    )  # fmt: skip
    return folder


def write_items(folder: Path, *, num_questions: int = 40, num_answers: int = 20, seed: int = 0) -> Path:
    """What each test question gave, whose means are those of the run's metrics (bits per byte are some others).

    Every question is as much harder or easier for all models; the questions are those of `seed`.
    """
    metrics = pd.read_parquet(folder / "metrics.parquet")
    hardness = np.linspace(0.5, 1.5, num_questions)
    answered = np.arange(num_questions) < num_answers
    (folder / "items").mkdir()
    for round, rows in metrics.groupby("round"):
        tables = [
            pd.DataFrame(
                {
                    "client_id": row["client_id"],
                    "item": range(num_questions),
                    "nats": 10 * row["nll"] * hardness,
                    "num_tokens": 10,
                    "num_bytes": 29,
                    **{name: np.where(answered, row[name], math.nan) for name in ("rouge_l", "similarity")},
                    "answer": [f"answer {item}" if answered[item] else None for item in range(num_questions)],
                }
            )
            for _, row in rows.iterrows()
        ]
        pd.concat(tables).to_parquet(folder / f"items/round_{round:03d}.parquet", index=False)
    test = tuple(Example(f"question {seed} {item}?", "test", "qa") for item in range(num_questions))
    write_split(dataclasses.replace(read_split(folder / "data.parquet"), test=test), folder / "data.parquet")
    return folder


def forget_rounds_after(folder: Path, last: int) -> Path:
    """Leave what a run that was killed after round `last` was committed would have left."""
    for name in ("rounds", "metrics", "ledger"):
        frame = pd.read_parquet(folder / f"{name}.parquet")
        frame[frame["round"] <= last].to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def metrics_row(round: int, client: int, model: str, **values: float) -> dict:
    nll = 2.0 - 0.1 * round * (client + 1)
    return {
        "round": round,
        "client_id": client,
        "model": model,
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll / 2,
        "rouge_l": 0.1 * round,
        "similarity": 0.3 + 0.1 * round,
        "train_loss": 1.0 if round else math.nan,
        "num_private": 10,
        "num_pseudo_labels": 4 if round > 1 else 0,
        **values,
    }


def ledger_row(round, client, worker, stage, start, seconds, source="estimated", **values) -> dict:
    joules = math.nan if source == "unavailable" else 0.0 if stage == "idle" else 10.0 * seconds
    return {
        "round": round,
        "client_id": client,
        "worker": worker,
        "node": "n0",
        "stage": stage,
        "started_at": start,
        "duration_seconds": seconds,
        "tokens": 7,
        "uplink_bytes": 0,
        "downlink_bytes": 0,
        "energy_joules": joules,
        "energy_source": source,
        "gpus": "",
        **values,
    }


def consensus_rows(round, num_prompts, num_clients, present, answer) -> list[dict]:
    return [
        {
            "prompt_id": prompt,
            "client_id": client,
            "answer": answer(round, prompt, client) if client in present else "",
            "similarity": 0.5 + client / 100 if client in present else math.nan,
            "chosen": prompt > 0 and client == (prompt + round) % num_clients and client in present,
            "agreement": prompt / num_prompts if present else math.nan,
            "abstained": prompt == 0,
        }
        for prompt in range(num_prompts)
        for client in range(num_clients)
    ]


def split(num_prompts: int, num_clients: int) -> DataSplit:
    return DataSplit(
        private=tuple((Example(f"private {client}", "secret", "qa"),) for client in range(num_clients)),
        public=tuple(Example(f"question {i}?", f"reference {i}", f"category {i % 2}") for i in range(num_prompts)),
        test=(Example("test?", "test", "qa"),),
    )
