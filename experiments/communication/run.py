"""Bytes of LoRA weights and of text: calculated by model size, and measured in a comparison's runs.

    python experiments/communication/run.py [COMPARISON] [--out DIR]

Writes models.csv, settings.csv and models.svg; and, from a folder that `semcons compare` wrote, measured.csv and
measured.svg.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Canvas

from semcons_ray.api.cost import (
    FIGURE_TARGETS,
    count_parameters,
    draw_figure,
    estimate,
    read_linear_maps,
    split_targets,
)
from semcons_ray.metering.units import format_quantity
from semcons_ray.modeling.shapes import SHAPES
from semcons_ray.reporting.drawing import BLUE, INK, log_axis, save

HERE = Path(__file__).parent
MODEL, TARGETS = "llama-3.1-405b", "q,v"
SETTING: dict[str, Any] = {
    "rank": 16, "dtype": "float16", "prompts": 500, "tokens": 100, "bytes_per_token": 4.0, "rounds": 100,
}  # fmt: skip
# Others that give about as much for the same model: the figure of 1006 doesn't tell its setting.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("q,k,v,o", {"prompts": 1000}),
    ("q,v", {"prompts": 256, "tokens": 190, "rounds": 15}),
    ("all-linear", {"prompts": 1000, "tokens": 300, "rounds": 15}),
    ("all-linear", {"prompts": 1000, "tokens": 310}),  # of a round
]


def calculate(model: str, targets: str, setting: dict[str, Any]) -> dict[str, Any]:
    """A row: bytes of a round in one direction, and the ratios for a round and for all rounds with the prompts sent
    once."""
    cost = estimate(read_linear_maps(model), targets=split_targets(targets), **setting)
    return {
        "lora_parameters": cost.parameters,
        "lora_bytes": cost.weights.uplink_bytes,
        "text_bytes": cost.text.uplink_bytes,
        "ratio_of_a_round": round(cost.ratio, 3),
        "ratio": round(cost.total_ratio, 3),
    }


def measure(rounds: pd.DataFrame) -> pd.DataFrame:
    """Bytes of a run by arm, from rows with the bytes since the run began: means over seeds, and their range."""
    runs = rounds.sort_values("round").groupby(["arm", "seed"]).last().reset_index()
    runs["total_bytes"] = runs["uplink_bytes"] + runs["downlink_bytes"]
    table = runs.groupby("arm").agg(
        seeds=("seed", "nunique"),
        rounds=("round", "max"),
        uplink_bytes=("uplink_bytes", "mean"),
        downlink_bytes=("downlink_bytes", "mean"),
        total_bytes=("total_bytes", "mean"),
        least=("total_bytes", "min"),
        most=("total_bytes", "max"),
    )
    return table.sort_values("total_bytes")


def draw_measured(table: pd.DataFrame, path: Path) -> None:
    """A bar for each arm, with the range over seeds; the axis is logarithmic, so where it begins has no meaning."""
    sent = table.loc[table["total_bytes"] > 0, "total_bytes"]
    begin = 10 ** (math.floor(math.log10(sent.min())) - 0.5)

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        log_axis(axes, "x", "B")
        spread = [sent - table.loc[sent.index, "least"], table.loc[sent.index, "most"] - sent]
        axes.barh(table.index, 0, left=begin)  # keeps the order, and a place for arms that send nothing
        axes.barh(sent.index, sent - begin, left=begin, color=BLUE, height=0.65, xerr=spread, ecolor=INK, capsize=3)
        for arm, row in table.iterrows():
            place = (max(row["most"], begin), arm)
            label = format_quantity(row["total_bytes"], "B")
            axes.annotate(label, place, xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_xlim(begin, table["most"].max() * 6)
        axes.grid(False, axis="y")
        axes.set_xlabel("bytes on the wire, a whole run, all clients, both ways (measured)")

    save(path, draw, (7.2, 0.8 + 0.36 * len(table)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="?", help="folder with rounds.csv, as semcons compare writes it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rows = [
        {"model": model, "parameters": count_parameters(model), "targets": targets} | calculate(model, targets, SETTING)
        for model in SHAPES
        for targets in FIGURE_TARGETS
    ]
    pd.DataFrame(rows).to_csv(args.out / "models.csv", index=False)
    settings = [(TARGETS, SETTING), *((targets, SETTING | changed) for targets, changed in OTHERS)]
    rows = [{"targets": targets} | setting | calculate(MODEL, targets, setting) for targets, setting in settings]
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "settings.csv", index=False)
    print(table.to_string(index=False))
    draw_figure(args.out / "models.svg", MODEL, TARGETS, clients=1, **SETTING)

    if args.comparison:
        measured = measure(pd.read_csv(args.comparison / "rounds.csv"))
        measured.to_csv(args.out / "measured.csv")
        draw_measured(measured, args.out / "measured.svg")
        print(measured.to_string())


if __name__ == "__main__":
    main()
