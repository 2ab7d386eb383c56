"""The results of a comparison: the quality that each arm reached, and its cost in bytes, seconds and joules.

An arm is an algorithm with its settings. It is run once for each seed, and arms with one seed share data and base
models, so differences between arms are taken seed by seed. Costs leave out evaluation, which is the simulator's, and
idling. Bytes are lengths of encoded messages and seconds are timed, so both are measured; the source of joules is
given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.evaluation.metrics import metrics_of
from semcons_ray.reporting.intervals import arm_intervals, mean_and_half_width
from semcons_ray.reporting.tables import (
    STAGES,
    energy,
    further_metrics,
    held_by_round,
    mean_by_round,
    read_items,
    read_ledger,
    read_metrics,
    read_rounds,
    read_table,
    telling,
)
from semcons_ray.runs.run_folder import Loss, RunFolder, comparable_loss

NOT_COUNTED = ("evaluate", "idle")
LOSS_COLUMNS: Mapping[Loss, tuple[str, str]] = {
    "nll": ("mean_nll", "worst_nll"),
    "bits_per_byte": ("bits_per_byte", "worst_bits_per_byte"),
}
"""By loss, the columns of `costs_by_round` with its mean and its maximum over clients."""
KEYS = ["arm", "seed"]
LABELS = ["arm", "algorithm", "seed"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Finished runs, compared; each frame is written to a CSV file of its name.

    Attributes:
        rounds: A row for each arm, seed and evaluated round: columns arm, algorithm, seed and those of
        `costs_by_round`. summary: A row for each arm, see `summarize`.
        stages: Index arm and stage (all stages); columns seconds and joules, means over seeds.
        metrics: A row for each arm and metric, see `arm_intervals`; none if there are runs without items.
    """

    rounds: pd.DataFrame
    summary: pd.DataFrame
    stages: pd.DataFrame
    metrics: pd.DataFrame


def compare_runs(runs: Mapping[tuple[str, int], Path], *, first: str, reference: str, baseline: str) -> Comparison:
    """Read and compare run folders, given by arm and seed; see `summarize` for the other arguments.

    Raises:
        RunFolderError: A table is missing or damaged; the message names the file.
    """
    rounds, stages, models = [], [], set()
    settings, items, questions = dict[str, None](), dict[tuple[str, int], pd.DataFrame](), dict[tuple[str, str], int]()
    for (arm, seed), folder in runs.items():
        ledger = read_ledger(folder)
        metrics = read_metrics(folder)
        rounds_done = read_rounds(folder)
        table = costs_by_round(metrics, rounds_done, ledger).reset_index()
        models |= set(telling(metrics, "nll")["model"])
        config = RunFolder(folder).stored_config()
        settings |= dict.fromkeys(config.evaluation.metrics)
        _, items[arm, seed] = read_items(folder, metrics, config.evaluation.metrics)
        items[arm, seed] = _named(items[arm, seed], folder, questions)
        table = table.assign(arm=arm, algorithm=config.algorithm.name, seed=seed)
        rounds.append(table[[*LABELS, *table.columns.drop(LABELS)]])
        stages.append(_work(ledger).assign(arm=arm, seed=seed))
    together, loss = pd.concat(rounds, ignore_index=True), comparable_loss(models)
    keys = [key for key in metrics_of(settings) if key != "nll" or loss == "nll"]
    return Comparison(
        rounds=together,
        summary=summarize(together, loss=loss, first=first, reference=reference, baseline=baseline),
        stages=mean_work(pd.concat(stages, ignore_index=True)),
        metrics=arm_intervals({run: table for run, table in items.items() if len(table)}, keys, first),
    )


def _named(items: pd.DataFrame, folder: Path, questions: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Items whose questions are numbered as in all runs; `questions` has those seen so far."""
    data = read_table(folder / "data.parquet", {"role": "str", "prompt": "str", "response": "str"})
    test = data[data["role"] == "test"]
    numbers = [
        questions.setdefault(pair, len(questions)) for pair in zip(test["prompt"], test["response"], strict=True)
    ]
    return items.assign(question=np.array(numbers)[items["question"]])


def costs_by_round(metrics: pd.DataFrame, rounds: pd.DataFrame, ledger: pd.DataFrame) -> pd.DataFrame:
    """The quality and the cost so far of one run, by evaluated round.

    A client that was not measured in a round counts with its last measurement. A loss that is NaN, as that of a model
    that diverged, or is not known yet, counts as infinite; one of a model that never tells it does not count.

    Returns:
        Index round; columns mean_nll and worst_nll (nats a token, mean and maximum over clients; NaN where clients have
        several models), bits_per_byte and worst_bits_per_byte, rouge_l, similarity, other metrics by their keys and
        train_loss (means over clients, train_loss in nats a token, NaN like mean_nll); untold (clients whose models do
        not tell how likely they find a text); and, summed from the run's beginning to the round's end, visits (of
        clients, asked for), failed (visits that failed), uplink_bytes, downlink_bytes, total_bytes, seconds (of work,
        over all workers), cost_usd, joules and energy_source.
    """
    table = pd.DataFrame(index=pd.Index(sorted(set(metrics["round"])), name="round"))
    for loss, (mean, worst) in LOSS_COLUMNS.items():
        held = held_by_round(telling(metrics, loss), loss).fillna(math.inf)
        table[mean], table[worst] = held.mean(axis="columns"), held.max(axis="columns")
    for metric in ("rouge_l", "similarity", *further_metrics(metrics)):
        table[metric] = mean_by_round(metrics, metric)
    table["untold"] = metrics["client_id"].nunique() - telling(metrics, "nll")["client_id"].nunique()
    table["train_loss"] = metrics.groupby("round")["train_loss"].mean()
    if comparable_loss(telling(metrics, "nll")["model"]) != "nll":
        table[["mean_nll", "worst_nll", "train_loss"]] = math.nan
    visits = rounds[rounds["round"] > 0].set_index("round")
    failed = visits["num_participants"] - visits["num_answered"]
    traffic = ledger.groupby("round")[["uplink_bytes", "downlink_bytes"]].sum()
    sums = traffic.assign(visits=visits["num_participants"], failed=failed).fillna(0).cumsum()
    names = ["visits", "failed", "uplink_bytes", "downlink_bytes"]
    table[names] = sums.reindex(table.index, method="ffill").astype("int64")[names]
    table["total_bytes"] = table["uplink_bytes"] + table["downlink_bytes"]
    work = ledger[~ledger["stage"].isin(NOT_COUNTED)]
    until = [work[work["round"] <= round] for round in table.index]
    table["seconds"] = [rows["duration_seconds"].sum() for rows in until]
    table["cost_usd"] = [rows["cost_usd"].sum() for rows in until]
    table["joules"], table["energy_source"] = zip(*map(energy, until), strict=True)
    return table


def summarize(rounds: pd.DataFrame, *, loss: Loss, first: str, reference: str, baseline: str) -> pd.DataFrame:
    """A row for each arm, in the order of `rounds`, with means over seeds and half widths of 95% t-intervals over
    seeds.

    Args:
        rounds: As in `Comparison`.
        loss: The loss by which arms are compared, see `comparable_loss`.
        first: The arm with which others are compared.
        reference: The arm at which gap_closed is 1.
        baseline: The arm at which gap_closed is 0.

    Returns:
        Index arm; columns algorithm, seeds (how many), failed (visits, of all seeds), loss (its name), nll,
        nll_half_width and worst_nll (after the last round; nats a token; NaN where an arm's clients have several
        models), bits_per_byte, bits_per_byte_half_width and worst_bits_per_byte, rouge_l, similarity,
        untold (clients of a run whose models do not tell how likely they find a text), bytes, bytes_per_visit (of a
        client in a round), bytes_ratio (of the reference to the arm), seconds, cost_usd, joules, energy_source; and of
        the loss: gap_closed (share of the way from the baseline's to the reference's; NaN where the reference is no
        better), difference and difference_half_width (less that of `first`, by seeds that both have), at_equal_bytes
        (at the last evaluated round by which the arm had sent no more than `first` in the whole run, or at round 0).
        NaN where an arm that is needed is missing or a seed's value is NaN; half widths are NaN
        for a single seed.
    """
    mean_loss = LOSS_COLUMNS[loss][0]
    last = rounds.sort_values("round").groupby(KEYS, sort=False).tail(1).set_index(KEYS).sort_index()
    of_first = last.loc[first] if first in last.index else last.iloc[:0].droplevel("arm")
    budgets = rounds["seed"].map(of_first["total_bytes"])
    within = rounds[budgets.notna() & ((rounds["round"] == 0) | (rounds["total_bytes"] <= budgets))]
    at_equal_bytes = within.sort_values("round").groupby(KEYS).tail(1).groupby("arm")[mean_loss].mean()
    rows = {}
    for arm in dict.fromkeys(rounds["arm"]):
        of_arm = last.loc[arm]
        seeds = of_arm.index.intersection(of_first.index)
        difference = mean_and_half_width((of_arm.loc[seeds, mean_loss] - of_first.loc[seeds, mean_loss]).to_numpy())
        mean = of_arm.mean(numeric_only=True, skipna=False)
        rows[arm] = {
            "algorithm": of_arm["algorithm"].iloc[0],
            "seeds": len(of_arm),
            "failed": of_arm["failed"].sum(),
            "loss": loss,
        }
        for name, (column, worst) in LOSS_COLUMNS.items():
            rows[arm][name], rows[arm][f"{name}_half_width"] = mean_and_half_width(of_arm[column].to_numpy())
            rows[arm][worst] = mean[worst]
        rows[arm] |= {
            **{name: mean[name] for name in ("rouge_l", "similarity")},
            "untold": of_arm["untold"].max(),
            "bytes": mean["total_bytes"],
            "bytes_per_visit": mean["total_bytes"] / mean["visits"],
            "bytes_ratio": math.nan,
            **{name: mean[name] for name in ("seconds", "cost_usd", "joules")},
            "energy_source": " or ".join(dict.fromkeys(of_arm["energy_source"])),
            "gap_closed": math.nan,
            "difference": difference[0],
            "difference_half_width": difference[1],
            "at_equal_bytes": at_equal_bytes.get(arm, math.nan),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")
    reached = table[loss].to_dict()
    if reference in reached:
        # Infinite for an arm that sends nothing.
        table["bytes_ratio"] = table["bytes"].to_dict()[reference] / table["bytes"]
    if reference in reached and baseline in reached:
        gap = reached[baseline] - reached[reference]
        table["gap_closed"] = (reached[baseline] - table[loss]) / (gap if gap > 0 else math.nan)
    return table


def _work(ledger: pd.DataFrame) -> pd.DataFrame:
    stages = ledger.groupby("stage")
    joules = stages["energy_joules"].sum(min_count=1)  # NaN, and not 0, where it is unavailable
    return pd.DataFrame({"seconds": stages["duration_seconds"].sum(), "joules": joules}).reset_index()


def mean_work(work: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of seconds and joules, by arm and stage; a stage that a seed's run did not have counts as 0."""
    stages = [stage for stage in STAGES if stage in set(work["stage"])]
    order = pd.MultiIndex.from_product([dict.fromkeys(work["arm"]), stages], names=["arm", "stage"])
    table = work.set_index([*KEYS, "stage"]).unstack("stage", fill_value=0.0).groupby("arm").mean()
    return pd.DataFrame(table.stack("stage", future_stack=True)).reindex(order)
