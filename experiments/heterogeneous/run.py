"""Each client of a consensus beside its twin that trained alone: the table and figure of README.md, from a
comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Canvas

from semcons_ray.reporting.drawing import BLUE, FAINT, save
from semcons_ray.reporting.tables import Run, quality, read_run

HERE = Path(__file__).parent
SCORES = ("nll", "bits_per_byte", "rouge_l")


def twins(comparison: Path) -> pd.DataFrame:
    """A row for each seed and client: scores of the base model, and after the last round alone and in the consensus.

    votes_won is the share of prompts that the client won in the last round with answers. NLL is in nats a token of the
    client's own tokenizer, and compares a client with its twin; bits per byte also compare clients with each other.
    """
    rows = []
    for folder in sorted((comparison / "runs" / "semantic-consensus").glob("seed_*")):
        together, alone = read_run(folder), read_run(comparison / "runs" / "local-only" / folder.name)
        answered = together.consensus[together.consensus["round"] == together.consensus["round"].max()]
        votes = answered.groupby("client_id")["chosen"].mean()
        ends = {"local": after_last_round(alone), "consensus": after_last_round(together)}
        for client, row in ends["consensus"].iterrows():
            scores = {f"base_{score}": row[f"base_{score}"] for score in SCORES}
            scores |= {
                f"{arm}_{score}": table.loc[client, f"last_{score}"] for score in SCORES for arm, table in ends.items()
            }
            model = row["model"].removeprefix("packaged:")
            seed = {"seed": together.config["seed"], "client_id": client, "model": model}
            rows.append(seed | scores | {"votes_won": votes[client]})
    return pd.DataFrame(rows)


def after_last_round(run: Run) -> pd.DataFrame:
    """See `tables.quality`. If a client was not measured in the last round, the script ends with an error."""
    table = quality(run.metrics)
    missing = set(range(run.config["clients"]["num_clients"])) - set(table.index[table["last_round"] == run.num_rounds])
    if missing:
        raise SystemExit(f"{run.folder}: clients {sorted(missing)} were not measured after round {run.num_rounds}")
    return table


def draw(canvas: Canvas, means: pd.DataFrame) -> None:
    """A line for each client, from its twin's bits per byte to its own."""
    axes = canvas.subplots()
    places = range(len(means), 0, -1)
    alone, together = means["local_bits_per_byte"], means["consensus_bits_per_byte"]
    axes.hlines(places, alone, together, color=FAINT)
    axes.plot(alone, places, "o", color="#009E73", label="alone")
    axes.plot(together, places, "D", color=BLUE, label="semantic consensus")
    axes.set_yticks(list(places), [f"client {row.client_id}\n{row.model}" for row in means.itertuples()])
    axes.set_xlabel("bits per byte of the test set's answers after the last round")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=2, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder that semcons compare wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = twins(args.comparison)
    table.to_csv(args.out / "twins.csv", index=False, float_format="%.4f")
    means = table.groupby(["client_id", "model"], as_index=False).mean(numeric_only=True)
    save(args.out / "twins.svg", lambda canvas: draw(canvas, means), (7.0, 0.7 * len(means) + 1.2))
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
