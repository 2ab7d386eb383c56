"""Seconds and joules of each algorithm by stage, from a folder that `semcons compare` wrote.

    python experiments/energy/run.py COMPARISON [--out DIR]

Writes stages.csv (means over seeds) and stages.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Canvas

from semcons_ray.reporting.drawing import STAGE_COLOURS, STAGE_NAMES, save

HERE = Path(__file__).parent
LEFT_OUT = ("idle", "evaluate")
"""Stages that are the simulator's and no federation's."""


def draw(canvas: Canvas, table: pd.DataFrame, source: str) -> None:
    """A bar for each arm, the most expensive on top; seconds and joules side by side."""
    order = table["seconds"].unstack("stage").fillna(0.0).sum(axis=1).sort_values().index
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, (column, label) in zip(
        panels, (("seconds", "seconds of busy processes"), ("joules", f"joules ({source})")), strict=True
    ):
        widths = table[column].unstack("stage").fillna(0.0).loc[order]
        left = widths.iloc[:, 0] * 0.0
        for stage in [stage for stage in STAGE_COLOURS if stage in widths]:
            axes.barh(order, widths[stage], left=left, height=0.7, color=STAGE_COLOURS[stage], label=STAGE_NAMES[stage])
            left = left + widths[stage]
        axes.set_xlabel(label)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder that semcons compare wrote")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    table = pd.read_csv(args.comparison / "stages.csv")
    table = table[~table["stage"].isin(LEFT_OUT)]
    sources = " or ".join(pd.read_csv(args.comparison / "summary.csv")["energy_source"].unique())
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "stages.csv", index=False, float_format="%.1f")
    table = table.set_index(["arm", "stage"])
    arms = table.index.get_level_values("arm").nunique()
    save(args.out / "stages.svg", lambda canvas: draw(canvas, table, sources), (9.0, 0.3 * arms + 1.6))
    print(table.groupby("arm").sum().round(1).sort_values("seconds").to_string())


if __name__ == "__main__":
    main()
