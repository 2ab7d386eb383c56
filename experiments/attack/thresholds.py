"""Does it help against attackers to give no label where agreement is low? The figures of README.md.

    python experiments/attack/thresholds.py runs/labels-? --out experiments/attack
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.consensus import Election
from semcons_ray.security.attacks import adaptive, harmless
from semcons_ray.studies.attacks import play
from semcons_ray.studies.labels import elect, read_answered

THRESHOLDS = (None, 0.5, 0.6, 0.7, 0.8)
SHARES = (0.0, 0.1, 0.2, 0.3)
DRAWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for thresholds.csv")
    args = parser.parse_args()
    rows = []
    for folder, threshold in itertools.product(args.runs, THRESHOLDS):
        run = read_answered(folder)
        election = Election("plurality", {"min_cosine": 1.0}, threshold=threshold, defence="independent")
        usual = elect(run, election, DRAWS)
        for attack, share in itertools.product((harmless, adaptive), SHARES):
            got = play(run, election, attack, share, usual)
            row = {"seed": run.seed, "threshold": threshold, "attack": attack.__name__, "share": share}
            labelled = float(np.mean([label is not None for label in got.labels]))
            rows.append(row | {"labelled": labelled, "right": got.accuracy, "captured": got.captured})
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "thresholds.csv", index=False, float_format="%.4f")
    shown = table.fillna({"threshold": -1}).groupby(["threshold", "attack", "share"])
    print(shown[["labelled", "right", "captured"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
