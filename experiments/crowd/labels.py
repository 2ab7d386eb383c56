"""How right labels are with fewer clients and fewer prompts: the labels of finished runs are elected again from a part
of their answers. The table of README.md.

    python experiments/crowd/labels.py runs/labels-? --out experiments/crowd
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.consensus import Election
from semcons_ray.data.split import read_split
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.labels import Answered, elect, read_answered

HERE = Path(__file__).parent
NUM_PROMPTS = (24, 48, 96)
RULES = {
    "plurality": Election("plurality", {"min_cosine": 1.0}),
    "expertise": Election("plurality", {"min_cosine": 1.0}, competence="expertise"),
}
RANDOM = "random client"


def part(run: Answered, clients: list[int], prompts: list[int]) -> Answered:
    """The last exchange of the run, of some clients and prompts only."""
    last = max(run.samples)

    def of(texts: list[str]) -> list[str]:
        return [texts[prompt] for prompt in prompts]

    return dataclasses.replace(
        run,
        samples={last: {client: [of(draw) for draw in run.samples[last][client]] for client in clients}},
        prompts=of([*run.prompts]),
        references=of([*run.references]),
        categories=of([*run.categories]),
    )


def right(run: Answered) -> dict[str, float]:
    """Share of labels that are right, by how they are elected from all draws, and of a client's first draw."""
    (clients,) = run.samples.values()
    shares = {RANDOM: float(np.mean([run.is_right(draws[0]).mean() for draws in clients.values()]))}
    for name, election in RULES.items():
        (labels,) = elect(run, election, run.most_samples(max(run.samples))).values()
        shares[name] = float(np.nanmean(run.is_right(labels)))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs whose clients have a skill each")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for labels.csv")
    args = parser.parse_args()
    rows = []
    for folder in args.runs:
        run = read_answered(folder)
        skills: dict[str, list[int]] = {}
        for client, share in enumerate(read_split(RunFolder(folder).data).private):
            skills.setdefault(share[0].category, []).append(client)
        order = np.random.default_rng(run.seed).permutation(len(run.prompts)).tolist()
        fewest = min(map(len, skills.values()))
        for per_skill, count in itertools.product(range(1, fewest + 1), NUM_PROMPTS):
            clients = [client for clients in skills.values() for client in clients[:per_skill]]
            found = right(part(run, clients, sorted(order[:count])))
            rows += [
                {"seed": run.seed, "clients": len(clients), "prompts": count, "labels": name, "right": share}
                for name, share in found.items()
            ]
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "labels.csv", index=False, float_format="%.4f")
    by = table.pivot(index=["clients", "prompts", "seed"], columns="labels", values="right")
    for place, seeds in by.groupby(level=[0, 1]):
        told = f"random {seeds[RANDOM].mean():.3f}"
        for name in RULES:
            gain, half = mean_and_half_width((seeds[name] - seeds[RANDOM]).to_numpy())
            told += f", {name} {seeds[name].mean():.3f} ({gain:+.3f} ± {half:.3f})"
        print(place, told)


if __name__ == "__main__":
    main()
