"""Does the consensus settle? Agreement and label churn of runs, beside the bound of FedCT's proposition.

    python experiments/theory/run.py [FOLDER ...] [--out DIR]

Writes bounds.csv: the round from which on the bound would say anything. Each FOLDER is a run, or contains runs, as a
comparison's folder does. The runs of semantic consensus among them are read, and may differ only in their seed and in
where they ran; from these it also writes rounds.csv, bound.json and churn.svg.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from scipy.special import zeta
from torch import Tensor

from semcons_ray.reporting.drawing import BLUE, INK, ORANGE, SKY, log_axis, place_legend, round_axis, save
from semcons_ray.reporting.tables import Run, read_run
from semcons_ray.runs.run_folder import RunFolder

HERE = Path(__file__).parent
EMBEDDING_MODEL = "packaged:all-minilm-l6-v2"
SAME = 0.8
"""Cosine from which on an old and a new pseudo-label say the same."""
FAR = 10**15


def bound(t0: float, *, prompts: int, clients: int, c: float) -> float:
    """Bound on the probability that a consensus label still changes after round `t0`.

    FedCT (arXiv:2310.05696), proposition: with i.i.d. private data and prompts, and training accuracy a_t >= 1 - c / t
    on any labels, delta <= |U| (4 c)^(m/2) zeta(m/2, t0 + 1), with Hurwitz's zeta. For a prompt's label to change
    in round t, half of the m clients must miss it: at most 2^m sets of them, each with probability (c / t)^(m/2).

    Args:
        t0: A round, from 0; from 1 if `c` is 1 or more.
        prompts: Number |U| of public prompts.
        clients: Number m of clients; for fewer than 3 the sum over rounds diverges, and the bound is infinite.
        c: How far clients are from reproducing their labels perfectly, see above.
    """
    if clients < 3:
        return math.inf
    return float(prompts * (4 * c) ** (clients / 2) * zeta(clients / 2, t0 + 1))


def first_telling_round(**setting: Any) -> int | None:
    """The first t0 for which `bound` is below 1; None if there is none up to `FAR`."""
    low, high = 0, 1
    while bound(high, **setting) >= 1:
        low, high = high, 2 * high
        if high > FAR:
            return None
    while high - low > 1:  # the bound falls with t0
        middle = (low + high) // 2
        low, high = (middle, high) if bound(middle, **setting) >= 1 else (low, middle)
    return high


def reproduced(consensus: pd.DataFrame) -> pd.DataFrame:
    """How much of what they were taught clients reproduce: training accuracy on the pseudo-labels.

    Args:
        consensus: A row for each answer; columns round, prompt_id, client_id, answer, chosen.

    Returns:
        Index round, from 2, columns client_id: the share of the pseudo-labels of the round before that are equal,
        letter by letter, to the client's answers.
    """
    labels = consensus.loc[consensus["chosen"], ["round", "prompt_id", "answer"]]
    taught = labels.assign(round=labels["round"] + 1).rename(columns={"answer": "label"})
    both = consensus.merge(taught, on=["round", "prompt_id"])
    equal = both["answer"] == both["label"]
    return equal.groupby([both["round"], both["client_id"]]).mean().unstack("client_id")


def semantic_churn(consensus: pd.DataFrame, embed: Callable[[Sequence[str]], Tensor]) -> pd.Series[float]:
    """By round, the share of prompts whose label has another meaning than in the round before; prompts without both are
    left out.

    Args:
        consensus: As for `reproduced`.
        embed: Turns texts into unit vectors.
    """
    labels = consensus.loc[consensus["chosen"], ["round", "prompt_id", "answer"]]
    before = labels.assign(round=labels["round"] + 1)
    both = labels.merge(before, on=["round", "prompt_id"], suffixes=("", "_before"))
    cosine = (embed(list(both["answer"])) * embed(list(both["answer_before"]))).sum(dim=1).cpu().numpy()
    return pd.Series(cosine < SAME, index=both.index).groupby(both["round"]).mean()


def by_round(run: Run, embed: Callable[[Sequence[str]], Tensor]) -> pd.DataFrame:
    """A row for each round of one run that formed a consensus: columns seed, round, agreement, exact_churn,
    semantic_churn, reproduced, c and train_loss (nats a token; NaN where models differ)."""
    table = run.rounds[run.rounds["round"].isin(run.consensus["round"])].set_index("round")
    table = table[["mean_agreement", "label_churn"]]
    table = table.rename(columns={"mean_agreement": "agreement", "label_churn": "exact_churn"})
    table["semantic_churn"] = semantic_churn(run.consensus, embed)
    table["reproduced"] = reproduced(run.consensus).mean(axis="columns")
    table["c"] = table.index * (1 - table["reproduced"])
    table["train_loss"] = run.metrics.groupby("round")["train_loss"].mean() if run.loss == "nll" else math.nan
    table.insert(0, "seed", run.config["seed"])
    return table.reset_index()


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders whose algorithm elects answers; they must be alike but for their seeds."""
    paths = {path.parent for folder in folders for path in folder.glob("**/rounds.parquet")}
    runs: list[Run] = []
    settings: dict[str, Path] = {}
    for path in sorted(paths):
        config = RunFolder(path).read_config()
        if config.algorithm.elects:
            runs.append(read_run(path))
            setting = config.model_dump_json(exclude={"name", "seed", "resources", "failures"})
            settings.setdefault(setting, path)
    if not runs:
        raise SystemExit(f"no run of semantic consensus in {', '.join(map(str, folders))}")
    if len(settings) > 1:
        first = ", ".join(map(str, settings.values()))
        raise SystemExit(f"these runs differ in more than the seed; give those of one setting: {first}")
    return runs


def judge(table: pd.DataFrame, *, prompts: int, clients: int) -> dict[str, Any]:
    """The bound with the measured c: the least c with which the proposition's condition holds in every round of the
    runs.

    Args:
        table: Rows of `by_round`, so the last round is the last that formed a consensus.
        prompts: See `bound`.
        clients: See `bound`.
    """
    c = float(table.groupby("round")["c"].mean().max())
    if math.isnan(c):
        raise SystemExit(
            "no client answered after it was taught a pseudo-label: the runs need three rounds at least, or two with "
            "algorithm.answer_last_round"
        )
    setting: dict[str, Any] = {"prompts": prompts, "clients": clients, "c": c}
    rounds = int(table["round"].max())
    return {
        **setting,
        "rounds": rounds,
        "c_by_round": {str(round): value for round, value in table.groupby("round")["c"].mean().dropna().items()},
        "bound_after_last_round": bound(rounds, **setting),
        "vacuous": bound(rounds, **setting) >= 1,
        "first_telling_round": first_telling_round(**setting),
    }


def draw(table: pd.DataFrame, verdict: Mapping[str, Any], path: Path) -> None:
    """Left: what was measured, mean and range over seeds. Right: the bound over t0."""
    measured = {
        "agreement": ("agreement (cosine)", BLUE, "o", "-"),
        "exact_churn": ("labels changed", ORANGE, "s", "--"),
        "semantic_churn": (f"labels changed, cosine < {SAME:g}", SKY, "^", ":"),
        "reproduced": ("labels reproduced", INK, "D", "-."),
    }
    setting = {name: verdict[name] for name in ("prompts", "clients", "c")}
    telling = verdict["first_telling_round"]

    def draw_both(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        for column, (label, colour, marker, dashes) in measured.items():
            seeds = table.dropna(subset=column).groupby("round")[column]
            mean, least, most = seeds.mean(), seeds.min(), seeds.max()
            left.plot(mean.index, mean, color=colour, marker=marker, linestyle=dashes, label=label)
            left.fill_between(mean.index, least, most, color=colour, alpha=0.15, linewidth=0)
        round_axis(left, table["round"])
        left.set_ylabel(f"mean and range over {table['seed'].nunique()} seeds")
        place_legend(canvas, left, 4)

        last = 10 * telling if telling else FAR
        rounds = np.geomspace(1, max(last, 10 * verdict["rounds"]), 200)
        right.plot(rounds, [bound(t0, **setting) for t0 in rounds], color=BLUE)
        right.axhline(1, color=INK, linestyle="--", linewidth=1)
        right.axvspan(1, verdict["rounds"], color=ORANGE, alpha=0.3, linewidth=0)
        log_axis(right, "x")
        log_axis(right, "y")
        right.set_xlabel("round (shaded: these runs)")
        right.set_ylabel("bound on the chance of a later change")
        right.set_title(f"m = {setting['clients']}, |U| = {setting['prompts']}, c = {setting['c']:.2f}", fontsize=10)

    save(path, draw_both, (9.6, 3.8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bounds = [
        setting | {"first_telling_round": first_telling_round(**setting)}
        for prompts in (48, 500)
        for clients in (3, 4, 8, 16)
        for c in (0.5, 1.0, 2.0, 5.0)
        for setting in [{"prompts": prompts, "clients": clients, "c": c}]
    ]
    pd.DataFrame(bounds).to_csv(args.out / "bounds.csv", index=False)
    if not args.folders:
        return

    from semcons_ray.modeling.embedding import Embedder
    from semcons_ray.modeling.packaged import resolve_model

    runs = find_runs(args.folders)
    embedder = Embedder(resolve_model(EMBEDDING_MODEL))
    table = pd.concat([by_round(run, embedder.embed) for run in runs], ignore_index=True)
    rounds = runs[0].consensus.groupby("round")
    verdict = judge(
        table, prompts=int(rounds["prompt_id"].nunique().max()), clients=int(rounds["client_id"].nunique().min())
    )
    table.to_csv(args.out / "rounds.csv", index=False)
    (args.out / "bound.json").write_text(json.dumps(verdict, indent=2) + "\n")
    draw(table, verdict, args.out / "churn.svg")
    print(table.to_string(index=False))
    print(json.dumps(verdict, indent=2))


if __name__ == "__main__":
    main()
