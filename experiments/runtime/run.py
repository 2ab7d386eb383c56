"""Hours and joules of semantic consensus and of weight averaging, over links, devices and model sizes: finished runs of
SmolLM2, replayed. The tables of README.md.

    semcons compare experiments/runtime/policies.yaml --out runs/policies
    semcons compare experiments/skills/skills.yaml --out runs/skills                  # on a GPU
    python experiments/runtime/run.py runs/policies --skills runs/skills
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import semcons_ray as sr
from semcons_ray.config import FederationConfig
from semcons_ray.reporting.replay import Recorded, Replay, replay
from semcons_ray.studies.batch import slug
from semcons_ray.timeline.profiles import device, link

RESULTS = Path(__file__).parent / "results"
CONSENSUS, AVERAGING, ONE_SHOT, STACKING = "consensus", "FedAvg-LoRA", "one-shot FedAvg-LoRA", "FLoRA"
ARMS = (CONSENSUS, AVERAGING, ONE_SHOT, STACKING)
POLICIES = tuple(f"{arm}{policy}" for arm in (CONSENSUS, AVERAGING) for policy in ("", ", deadline", ", semi-async"))
MODELS = {
    None: "laptop-cpu",
    "llama-3.2-1b": "macbook-m4",
    "llama-3.1-8b": "rtx-4090",
    "llama-3.1-70b": "8xh100",
    "llama-3.1-405b": "16xh100",
}
"""Devices on which clients are imagined, by the model; None is the runs' own, SmolLM2-135M."""
LINKS = ("4g", "dsl", "cable", "satellite", "5g", "fibre", "lan", "datacentre")
TYPICAL = "fibre"
"""The link of the table, and of the sensitivities."""

Runs = Mapping[str, Sequence[Recorded]]
"""The runs of each arm, by seed."""


def read_runs(folder: Path, arms: Sequence[str]) -> Runs:
    """The finished runs of these arms of a comparison."""
    return {arm: [Recorded.read(path) for path in sorted((folder / "runs" / slug(arm)).glob("seed_*"))] for arm in arms}


def federation(model: str | None, line: str = TYPICAL, **settings: Any) -> FederationConfig:
    """All clients have the device of the model and this link; the server's link is a data centre's."""
    return FederationConfig(devices={MODELS[model]: 1}, links={line: 1}, model=model, **settings)


def replays(runs: Runs, imagined: FederationConfig) -> dict[str, list[Replay]]:
    """The runs of each arm, in a federation."""
    return {arm: [replay(one, imagined) for one in of_arm] for arm, of_arm in runs.items()}


def mean(of_arm: Sequence[Replay], name: str) -> float:
    """Mean over seeds of a total."""
    return float(np.mean([one.totals[name] for one in of_arm]))


def break_even(folder: Path) -> sr.BreakEven:
    """Hours and joules of consensus for each of averaging, at equal rounds, by model and link."""
    models = {model or "own": name for model, name in MODELS.items()}
    return sr.break_even(folder, models=models, links=LINKS, arms=[CONSENSUS], against=AVERAGING)


def table_of_models(runs: Runs) -> Iterator[dict[str, Any]]:
    """By model and arm, what its rounds take, and what it takes to reach the loss that both consensus and averaging
    reach."""
    for model in MODELS:
        done = replays(runs, federation(model))
        losses = [[one.totals["loss"] for one in done[arm]] for arm in (CONSENSUS, AVERAGING)]
        both = [max(of_seed) for of_seed in zip(*losses, strict=True)]
        for arm, of_arm in done.items():
            to_quality = [one.hours_to(loss) for one, loss in zip(of_arm, both, strict=True)]
            yield {
                "model": model or "smollm2-135m",
                "device": MODELS[model],
                "algorithm": arm,
                **{name: mean(of_arm, name) for name in ("hours", "joules", "grams_co2", "bytes", "loss")},
                **{name: mean(of_arm, name) for name in ("compute_joules", "radio_joules", "idle_joules")},
                "hours to equal quality": float(np.mean(to_quality)) if not np.isnan(to_quality).any() else math.nan,
                "bytes are": of_arm[0].sources["bytes"],
            }


def with_more_data(runs: Runs, times: float) -> Runs:
    """The runs as if each client had so many times its private examples, and the prompts, answers and messages that it
    has: what averaging trains on a visit is private data, so consensus trains on as much more."""
    key = ["client_id", "round"]
    more: dict[str, list[Recorded]] = {CONSENSUS: [], AVERAGING: []}
    for consensus, averaging in zip(runs[CONSENSUS], runs[AVERAGING], strict=True):
        private = averaging.ledger.query("stage == 'fine_tune'").groupby(key)["tokens"].sum().rename("private")
        for arm, run in ((CONSENSUS, consensus), (AVERAGING, averaging)):
            ledger = run.ledger.join(private, on=key)
            added = (times - 1) * ledger["private"].where(ledger["stage"] == "fine_tune", 0).fillna(0)
            more[arm].append(replace(run, ledger=run.ledger.assign(tokens=ledger["tokens"] + added)))
    return more


def sensitivities(runs: Runs, model: str = "llama-3.1-8b") -> Iterator[dict[str, Any]]:
    """How ratios of hours and joules change as each assumption is halved and doubled, and with more private examples
    in a round."""
    of_device = {key: value for key, value in vars(device(MODELS[model])).items() if not key.startswith("_")}
    of_link = {key: value for key, value in vars(link(TYPICAL)).items() if not key.startswith("_")}
    two = {arm: runs[arm] for arm in (CONSENSUS, AVERAGING)}

    def ratios(own_device: dict[str, Any], own_link: dict[str, Any], two: Runs = two) -> dict[str, float]:
        imagined = FederationConfig(
            devices={"device": 1}, links={"line": 1}, model=model, own_devices={"device": own_device},
            own_links={"line": own_link},
        )  # fmt: skip
        done = replays(two, imagined)
        return {name: mean(done[CONSENSUS], name) / mean(done[AVERAGING], name) for name in ("hours", "joules")}

    yield {"assumption": "as assumed", "factor": 1.0, **ratios(of_device, of_link)}
    names = ("training_utilization", "generation_utilization", "busy_watts", "idle_watts")
    for factor in (0.5, 2.0):
        for name in names:
            changed = min(of_device[name] * factor, 1.0) if "utilization" in name else of_device[name] * factor
            yield {"assumption": name, "factor": factor, **ratios({**of_device, name: changed}, of_link)}
        for name in ("up_mbit", "down_mbit", "latency_ms"):
            yield {"assumption": name, "factor": factor, **ratios(of_device, {**of_link, name: of_link[name] * factor})}
    for factor in (10.0, 100.0):
        found = ratios(of_device, of_link, with_more_data(runs, factor))
        yield {"assumption": "private examples a round", "factor": factor, **found}


def policies(folder: Path) -> pd.DataFrame:
    """By arm, seed and round, virtual hours and the loss after the round, in the federation in which the runs were."""
    rows = []
    for arm in POLICIES:
        for path in sorted((folder / "runs" / slug(arm)).glob("seed_*")):
            run = Recorded.read(path)
            done = replay(run, run.config.federation)
            table = done.rounds[["round", "hours", "num_asked", "num_heard", "joules", "loss"]]
            rows.append(pd.DataFrame({"arm": arm, "seed": run.config.seed, **table}))
    return pd.concat(rows, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the comparison's folder")
    parser.add_argument("--skills", type=Path, help="the folder of experiments/skills/skills.yaml")
    args = parser.parse_args()
    folder, runs = args.folder, read_runs(args.folder, ARMS)
    RESULTS.mkdir(exist_ok=True)
    tables = {
        "models": pd.DataFrame(table_of_models(runs)),
        "sensitivity": pd.DataFrame(sensitivities(runs)),
        "policies": policies(folder),
    }
    for name, table in tables.items():
        table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.6g")
        print(f"\n{name}\n{table.to_string(index=False)}")
    for of_all, target in ((folder, RESULTS), (args.skills, RESULTS / "skills")):
        if of_all:
            found = break_even(of_all)
            found.write(target)
            print(f"\n{found}")


if __name__ == "__main__":
    main()
