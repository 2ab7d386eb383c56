"""By how much do honest votes lead? The figures of README.md.

    python experiments/attack/margins.py runs/labels-? --out experiments/attack

Whoever knows the answers, and has more votes than the lead of the first over the second, can have the second elected.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pandas as pd

from semcons_ray.evaluation.scores import exact_match
from semcons_ray.studies.labels import Answered, read_answered

SHARES = (0.0, 0.1, 0.2, 0.3)
"""Shares of all clients, which are malicious."""


def leads(run: Answered) -> pd.DataFrame:
    """A row for each prompt: by how many votes the most common text leads, and whether it is right. A client has one
    vote, of which each of its draws is an equal part."""
    samples = run.samples[max(run.samples)]
    rows = []
    for prompt, reference in enumerate(run.references):
        votes = Counter[str]()
        for drawn in samples.values():
            for answers in drawn:
                votes[answers[prompt]] += 1 / len(drawn)
        votes.pop("", None)
        (text, first), (_, second) = (*votes.most_common(2), ("", 0.0), ("", 0.0))[:2]
        rows.append({"lead": first - second, "right": bool(text and reference) and exact_match(text, reference) == 1})
    return pd.DataFrame(rows)


def safe(run: Answered) -> list[dict[str, float]]:
    """For each share, how many labels lead by more votes than so many attackers have beside the honest clients."""
    table, clients = leads(run), len(run.samples[max(run.samples)])
    rows = []
    for share in SHARES:
        kept = table["lead"] > share / (1 - share) * clients
        right = {"right": float((kept & table["right"]).mean()), "accuracy": table.loc[kept, "right"].mean()}
        rows.append({"clients": clients, "seed": run.seed, "share": share, "safe": float(kept.mean()), **right})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for margins.csv")
    args = parser.parse_args()
    table = pd.DataFrame([row for folder in args.runs for row in safe(read_answered(folder))])
    table.to_csv(args.out / "margins.csv", index=False, float_format="%.4f")
    print(table.groupby(["clients", "share"])[["safe", "right", "accuracy"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
