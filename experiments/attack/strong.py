"""What the defence costs where a few clients know much more than the others: such clients are added to the answers that
runs have stored, and the labels are elected anew. And what known answers change in it, for them and for attackers. The
tables of README.md.

    python experiments/attack/strong.py runs/labels-? --out experiments/attack
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.consensus import Election
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.studies.attacks import attack_table, make_attacks
from semcons_ray.studies.labels import Answered, elect, read_answered

HERE = Path(__file__).parent
NUM_KNOWN = 16
"""How many answers the server knows where it knows some."""

STRONG = ((0, 0.0), (2, 0.5), (2, 0.8), (2, 0.95), (3, 0.5), (3, 0.8), (3, 0.95))
"""How many strong clients there are, and what share of the answers each knows."""

DEFENCES = ("none", "independent")
SHARES = (0.1, 0.2, 0.3)
SAYS_IT = 0.95
"""How often a strong client gives the answer that it knows; else it answers as a client of the run does."""


def with_strong(run: Answered, count: int, knows: float, num_samples: int) -> Answered:
    """The last exchange of the run, with so many more clients, each of which knows the right answer to so large a share
    of the prompts, drawn for it at random."""
    last = max(run.samples)
    honest = {client: [list(draw) for draw in draws[:num_samples]] for client, draws in run.samples[last].items()}
    first = max(honest) + 1
    random = np.random.default_rng([run.seed, count, round(100 * knows)])
    strong = {}
    for client in range(first, first + count):
        known = random.random(len(run.prompts)) < knows
        strong[client] = [
            [
                right if is_known and random.random() < SAYS_IT else other
                for right, is_known, other in zip(run.references, known, draw, strict=True)
            ]
            for draw in honest[sorted(honest)[client - first]]
        ]
    examples = {**run.num_examples, **dict.fromkeys(strong, run.num_examples[min(honest)])}
    return dataclasses.replace(run, samples={last: {**honest, **strong}}, num_examples=examples)


def with_sentinels(run: Answered) -> Answered:
    """The same where the server knows the answers to `NUM_KNOWN` prompts drawn at random."""
    drawn = np.random.default_rng([run.seed, NUM_KNOWN]).choice(len(run.prompts), NUM_KNOWN, replace=False).tolist()
    known = {prompt: run.references[prompt] for prompt in drawn}
    unknown = ["" if prompt in known else text for prompt, text in enumerate(run.references)]
    return dataclasses.replace(run, known=known, references=unknown)


def election(competence: str, defence: str) -> Election:
    """The most common text."""
    return Election("plurality", {"min_cosine": 1.0}, competence=competence, defence=defence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for strong.csv, and for known/attack.csv")
    args = parser.parse_args()
    stored = [read_answered(folder) for folder in args.runs]
    rows = []
    for run, (count, knows), draws in itertools.product(stored, STRONG, (1, 8)):
        added = with_strong(run, count, knows, draws)
        for answered, defence in itertools.product((added, with_sentinels(added)), DEFENCES):
            competence = "sentinels" if answered.known else "expertise"
            (labels,) = elect(answered, election(competence, defence), draws).values()
            row = {"seed": run.seed, "strong": count, "knows": knows, "draws": draws, "known": len(answered.known)}
            right = float(np.nanmean(answered.is_right(labels)))
            rows.append(row | {"competence": competence, "defence": defence, "right": right})
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "strong.csv", index=False, float_format="%.4f")
    by = table.pivot_table(index=["known", "draws", "strong", "knows", "seed"], columns="defence", values="right")
    told = by.groupby(level=[0, 1, 2, 3]).mean()
    cost = (by["none"] - by["independent"]).groupby(level=[0, 1, 2, 3])
    told["cost"], told["half width"] = zip(*(mean_and_half_width(one.to_numpy()) for _, one in cost), strict=True)
    print(told.round(3).to_string())
    ways = [election("sentinels", defence) for defence in DEFENCES]
    tried = attack_table([with_sentinels(run) for run in stored], ways, make_attacks(()), SHARES, lambda line: None)
    tried.write(args.out / "known")
    print(tried)


if __name__ == "__main__":
    main()
