"""What the defence costs where a few clients know much more than the others: such clients are added to the answers that
runs have stored, and the labels are elected anew. The table of README.md.

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
from semcons_ray.studies.labels import Answered, elect, read_answered

HERE = Path(__file__).parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for strong.csv")
    args = parser.parse_args()
    rows = []
    for folder, count, knows, draws in itertools.product(args.runs, (0, 2, 3), (0.5, 0.8, 0.95), (1, 8)):
        if count or knows == 0.5:
            run = with_strong(read_answered(folder), count, knows, draws)
            for competence, defence in itertools.product(("equal", "expertise"), ("none", "independent")):
                way = Election("plurality", {"min_cosine": 1.0}, competence=competence, defence=defence)
                (labels,) = elect(run, way, draws).values()
                row = {"seed": run.seed, "strong": count, "knows": knows if count else np.nan, "draws": draws}
                rows.append(row | {"competence": competence, "defence": defence, "right": run.is_right(labels).mean()})
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "strong.csv", index=False, float_format="%.4f")
    keys = ["strong", "knows", "draws", "competence", "defence"]
    told = table.groupby(keys, dropna=False)["right"].agg(lambda right: mean_and_half_width(right.to_numpy())[0])
    print(told.unstack("defence").round(3).to_string())


if __name__ == "__main__":
    main()
