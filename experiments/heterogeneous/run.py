"""Each client beside its twin that trained alone: the table and figure of README.md, from a comparison's folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Canvas

from semcons_ray.reporting.drawing import BLUE, FAINT, save

HERE = Path(__file__).parent


def twins(comparison: Path) -> pd.DataFrame:
    """A row a seed and client: NLL of the base model, alone and in the consensus, after the last round; votes won."""
    rows = []
    for folder in sorted((comparison / "runs" / "semantic-consensus").glob("seed_*")):
        together = pd.read_parquet(folder / "metrics.parquet")
        alone = pd.read_parquet(comparison / "runs" / "local-only" / folder.name / "metrics.parquet")
        last = together["round"].max()
        votes = pd.read_parquet(folder / f"consensus/round_{last:03d}.parquet").groupby("client_id")["chosen"].mean()
        base = together[together["round"] == 0].set_index("client_id")
        ends = {
            name: frame[frame["round"] == last].set_index("client_id")
            for name, frame in (("consensus", together), ("local", alone))
        }
        rows += [
            {
                "seed": int(folder.name.removeprefix("seed_")),
                "client_id": client,
                "model": base.loc[client, "model"].removeprefix("packaged:"),
                "base_nll": base.loc[client, "nll"],
                "local_nll": ends["local"].loc[client, "nll"],
                "consensus_nll": ends["consensus"].loc[client, "nll"],
                "local_rouge_l": ends["local"].loc[client, "rouge_l"],
                "consensus_rouge_l": ends["consensus"].loc[client, "rouge_l"],
                "votes_won": votes[client],
            }
            for client in base.index
        ]
    return pd.DataFrame(rows)


def draw(canvas: Canvas, means: pd.DataFrame) -> None:
    """A line a client from its twin's NLL to its own."""
    axes = canvas.subplots()
    places = range(len(means), 0, -1)
    axes.hlines(places, means["local_nll"], means["consensus_nll"], color=FAINT)
    axes.plot(means["local_nll"], places, "o", color="#009E73", label="alone")
    axes.plot(means["consensus_nll"], places, "D", color=BLUE, label="semantic consensus")
    axes.set_yticks(list(places), [f"client {row.client_id}\n{row.model}" for row in means.itertuples()])
    axes.set_xlabel("test NLL after the last round\n(nats a token of the client's own tokenizer)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=2, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder of semcons compare")
    args = parser.parse_args()
    table = twins(args.comparison)
    table.to_csv(HERE / "twins.csv", index=False, float_format="%.4f")
    means = table.groupby(["client_id", "model"], as_index=False).mean(numeric_only=True)
    save(HERE / "twins.svg", lambda canvas: draw(canvas, means), (7.0, 0.7 * len(means) + 1.2))
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
