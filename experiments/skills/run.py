"""What clients of a comparison can do in each skill, their own and those of others, and how many labels are right: the
tables of README.md."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

import semcons_ray as sr
from semcons_ray.reporting.intervals import mean_and_half_width

HERE = Path(__file__).parent
SCORE, ALONE = "exact_match", "local only"

Runs = Mapping[tuple[str, int], sr.Run]


def categories(run: sr.Run, role: str) -> pd.Series:
    """The skill of each example of a role, in their order."""
    data = pd.read_parquet(run.path / "data.parquet")
    return data.loc[data["role"] == role].reset_index(drop=True)["category"]


def skills(runs: Runs) -> pd.DataFrame:
    """A row for each arm, seed, client and skill: the share of test items that the last model answers rightly, and
    whether the skill is the client's own."""
    rows = []
    for (arm, seed), run in runs.items():
        data = pd.read_parquet(run.path / "data.parquet")
        own = data[data["role"] == "private"].groupby("client_id")["category"].agg(lambda skill: skill.iloc[0])
        items = run.items(run.config.num_rounds)
        items["skill"] = items["item"].map(categories(run, "test"))
        if missing := set(own.index) - set(items["client_id"]):  # all clients share one model, measured once
            (measured,) = set(items["client_id"])
            copies = [items.assign(client_id=client) for client in missing]
            items = pd.concat([items[items["client_id"] == measured], *copies])
        for (client, skill), answers in items.groupby(["client_id", "skill"]):
            place = {"arm": arm, "seed": seed, "client_id": client, "model": run.config.client_models()[client]}
            rows.append(
                {**place, "skill": skill, "own": own[client] == skill, SCORE: answers[SCORE].mean(), "n": len(answers)}
            )
    return pd.DataFrame(rows)


def labels(runs: Runs) -> pd.DataFrame:
    """A row for each arm, seed and exchange: the share of pseudo-labels that are right, and the oracle: of prompts to
    which any answer is."""
    rows = []
    for (arm, seed), run in runs.items():
        data = pd.read_parquet(run.path / "data.parquet")
        references = data.loc[data["role"] == "public", "response"].reset_index(drop=True)
        for round in sorted(int(path.stem[-3:]) for path in (run.path / "consensus").glob("round_*.parquet")):
            answers, given = run.answers(round), run.labels(round)
            answers["right"] = answers["answer"].str.strip() == answers["prompt_id"].map(references)
            right = given["label"].str.strip() == given["prompt_id"].map(references)
            rows.append(
                {
                    **{"arm": arm, "seed": seed, "round": round},
                    "num_prompts": len(references),
                    "num_labels": len(given),
                    "right": right.sum() / len(references),
                    "any_answer": answers.groupby("prompt_id")["right"].max().mean(),
                    "mean_answer": answers["right"].mean(),
                }
            )
    return pd.DataFrame(rows)


def by_arm(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm and seed: exact match in clients' own skills, in those of others, and in all."""
    group = table.groupby(["arm", "seed", "own"])[SCORE].mean().unstack("own")
    group = group.rename(columns={True: "own_skill", False: "other_skills"})
    group["all_skills"] = table.groupby(["arm", "seed"])[SCORE].mean()
    return group.reset_index().rename_axis(columns=None)


def summary(arms: pd.DataFrame, given: pd.DataFrame, bytes_sent: pd.DataFrame) -> pd.DataFrame:
    """By arm, means over seeds, and the differences to `ALONE`, seed by seed, with half of their 95% intervals."""
    alone = arms[arms["arm"] == ALONE].set_index("seed")
    rows = []
    for arm, seeds in arms.groupby("arm", sort=False):
        row: dict[str, object] = {"arm": arm, "seeds": len(seeds)}
        paired = seeds.set_index("seed").join(alone, rsuffix="_alone", how="inner")
        for column in ("own_skill", "other_skills", "all_skills"):
            gain, half = mean_and_half_width((paired[column] - paired[f"{column}_alone"]).to_numpy(float))
            row |= {column: seeds[column].mean(), f"{column}_gain": gain, f"{column}_half_width": half}
        row["labels_right"] = given.loc[given["arm"] == arm, "right"].mean() if len(given) else float("nan")
        row["bytes"] = bytes_sent.loc[bytes_sent["arm"] == arm, "bytes"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, nargs="+", help="folders that semcons compare wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {key: run for folder in args.comparison for key, run in sr.load(folder).runs.items()}
    table, given = skills(runs), labels(runs)
    sent = pd.DataFrame(
        {"arm": arm, "seed": seed, "bytes": run.ledger[["uplink_bytes", "downlink_bytes"]].to_numpy().sum()}
        for (arm, seed), run in runs.items()
    )
    arms = by_arm(table)
    for name, each in {"skills": table, "labels": given, "arms": arms, "summary": summary(arms, given, sent)}.items():
        each.to_csv(args.out / f"{name}.csv", index=False, float_format="%.4f")
    print(summary(arms, given, sent).round(3).to_string(index=False), given.round(3).to_string(index=False), sep="\n\n")


if __name__ == "__main__":
    main()
