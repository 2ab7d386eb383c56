"""What each client of a run with black boxes can do after the first and the last round: the tables of README.md, from a
comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.reporting.tables import read_run

HERE = Path(__file__).parent
SCORE = "exact_match"


def clients(comparison: Path) -> pd.DataFrame:
    """A row for each seed and client.

    base, first, last: exact match of the base model, and after the first and the last round.
    votes_won: share of all prompts of all rounds whose label is the client's answer.
    """
    rows = []
    for folder in sorted((comparison / "runs" / "semantic-consensus").glob("seed_*")):
        run = read_run(folder)
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


def labels(comparison: Path) -> pd.DataFrame:
    """A row for each seed and round: the share of pseudo-labels that are right, and of each client's answers."""
    rows = []
    for folder in sorted((comparison / "runs" / "semantic-consensus").glob("seed_*")):
        data = pd.read_parquet(folder / "data.parquet")
        right = data.loc[data["role"] == "public", "response"].reset_index(drop=True)
        for path in sorted((folder / "consensus").glob("round_*.parquet")):
            votes = pd.read_parquet(path)
            votes["right"] = votes["answer"].str.strip() == votes["prompt_id"].map(right)
            of_clients = votes.groupby("client_id")["right"].mean().add_prefix("client_")
            place = {"seed": folder.name.removeprefix("seed_"), "round": int(path.stem.removeprefix("round_"))}
            rows.append(place | {"labels": votes.loc[votes["chosen"], "right"].mean()} | of_clients.to_dict())
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder that semcons compare wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = clients(args.comparison)
    table.to_csv(args.out / "clients.csv", index=False, float_format="%.4f")
    right = labels(args.comparison)
    right.to_csv(args.out / "labels.csv", index=False, float_format="%.4f")
    means = summary(table)
    means.to_csv(args.out / "summary.csv", index=False, float_format="%.4f")
    print(*(each.round(3).to_string(index=False) for each in (right, table, means)), sep="\n\n")


if __name__ == "__main__":
    main()
