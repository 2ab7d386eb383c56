"""What each client of a run with black boxes can do after the first and the last round: the tables of README.md, from a
comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.reporting.tables import Run, read_run

HERE = Path(__file__).parent
SCORE = "exact_match"


def clients(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each seed and client.

    base, first, last: exact match of the base model, and after the first and the last round.
    votes_won: share of all prompts of all rounds whose label is the client's answer.
    """
    rows = []
    for run in runs:
        scores = run.metrics.pivot_table(index="client_id", columns="round", values=SCORE)
        votes = run.consensus.groupby("client_id")["chosen"].mean()
        models = run.metrics.drop_duplicates("client_id").set_index("client_id")["model"]
        for client, row in scores.iterrows():
            rows.append(
                {
                    "seed": run.config["seed"],
                    "client_id": client,
                    "model": models[client].removeprefix("packaged:"),
                    "base": row[0],
                    "first": row[1],
                    "last": row[run.num_rounds],
                    "votes_won": votes[client],
                }
            )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By client, means over seeds, and the gain from the first round to the last with half of its 95% interval."""
    rows = []
    for (client, model), seeds in table.groupby(["client_id", "model"]):
        gain, half = mean_and_half_width((seeds["last"] - seeds["first"]).to_numpy(float))
        means = seeds[["base", "first", "last", "votes_won"]].mean()
        rows.append({"client_id": client, "model": model, **means, "gain": gain, "half_width": half})
    return pd.DataFrame(rows)


def labels(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each seed and round: the share of pseudo-labels that are right, and of each client's answers."""
    rows = []
    for run in runs:
        references = run.data.loc[run.data["role"] == "public", "response"].reset_index(drop=True)
        answers = run.consensus.assign(
            right=run.consensus["answer"].str.strip() == run.consensus["prompt_id"].map(references)
        )
        for round, votes in answers.groupby("round"):
            of_clients = votes.groupby("client_id")["right"].mean().add_prefix("client_")
            place = {"seed": run.config["seed"], "round": round}
            rows.append(place | {"labels": votes.loc[votes["chosen"], "right"].mean()} | of_clients.to_dict())
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder that semcons compare wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [read_run(folder) for folder in sorted((args.comparison / "runs" / "semantic-consensus").glob("seed_*"))]
    table = clients(runs)
    table.to_csv(args.out / "clients.csv", index=False, float_format="%.4f")
    right = labels(runs)
    right.to_csv(args.out / "labels.csv", index=False, float_format="%.4f")
    means = summary(table)
    means.to_csv(args.out / "summary.csv", index=False, float_format="%.4f")
    print(*(each.round(3).to_string(index=False) for each in (right, table, means)), sep="\n\n")


if __name__ == "__main__":
    main()
