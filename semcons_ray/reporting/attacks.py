"""How attacks on the consensus went: a table for the terminal, and a figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter
from rich.table import Table
from rich.text import Text

from semcons_ray.reporting.drawing import CLIENT_COLOURS, MARKERS, save
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.reporting.terminal import as_text, narrow_table

KEYS = ["rule", "competence", "defence", "attack", "share"]
LEARNT = ("success", "usual_success", "test_accuracy", "usual_test_accuracy")
"""What models do that learnt attacked labels and the usual ones; see `studies.attacks.attack_table`."""
ACROSS = 4
"""Panels of the figure in a row."""


def summarize_attacks(table: pd.DataFrame) -> pd.DataFrame:
    """Means over runs, and half widths of 95% t-intervals, NaN for a single run.

    Args:
        table: A row for each run, rule, defence, attack and share, with num_attackers, captured, accuracy and lost, and
            perhaps `LEARNT`.

    Returns:
        A row for each rule, defence, attack and share: num_attackers (of the first run), and the other columns, each
        with another that ends in _half_width.
    """
    measured = [*("captured", "accuracy", "lost"), *(name for name in LEARNT if name in table)]
    rows = []
    for key, group in table.groupby(KEYS, sort=False):
        row = dict(zip(KEYS, key, strict=True)) | {"num_attackers": group["num_attackers"].iloc[0]}
        for name in measured:
            row[name], row[f"{name}_half_width"] = mean_and_half_width(group[name].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def render_attacks(summary: pd.DataFrame, num_runs: int, width: int | None = None) -> str:
    """The labels that attackers captured, as text: a row for each rule, defence and attack, a column for each share.

    Args:
        summary: See `summarize_attacks`.
        num_runs: Over how many runs it is.
        width: In characters; None: the terminal's.
    """
    attacked = summary[summary["share"] > 0]
    table = narrow_table("Labels captured, and accuracy of all labels")
    for name in ("rule", "defence", "attack"):
        table.add_column(name)
    shares = sorted(summary["share"].unique())
    for share in shares:
        table.add_column(f"{share:.0%} malicious", justify="right")
    for (rule, defence), group in summary.groupby(["rule", "defence"], sort=False):
        alone = group[group["share"] == 0]
        for attack, rows in attacked.loc[group.index.intersection(attacked.index)].groupby("attack", sort=False):
            by_share = pd.concat([alone, rows]).set_index("share")
            cells = [_cell(by_share.loc[share]) if share in by_share.index else "–" for share in shares]
            table.add_row(str(rule), str(defence), str(attack), *cells)
    note = "captured / accuracy: captured labels are the attackers', wrong, and would not be there without them."
    seeds = f" Means over {num_runs} runs, ± half of the 95% t-interval." if num_runs > 1 else ""
    told = as_text(table, Text(), Text(note + seeds), width=width)
    if "success" in summary:
        told += as_text(Text(), _table_of_learnt(summary[summary["success"].notna()]), width=width)
    return told


def _table_of_learnt(learnt: pd.DataFrame) -> Table:
    table = narrow_table("Models that learnt the labels for one round, and without attackers")
    for name in ("rule", "defence", "attack"):
        table.add_column(name)
    for name in ("malicious", "answer as attackers want", "without", "right", "without"):
        table.add_column(name, justify="right")
    for _, row in learnt.iterrows():
        cells = [f"{_percent(row, name)}%" for name in LEARNT]
        table.add_row(str(row["rule"]), str(row["defence"]), str(row["attack"]), f"{row['share']:.0%}", *cells)
    return table


def _cell(row: pd.Series) -> str:
    return f"{_percent(row, 'captured')} / {_percent(row, 'accuracy')}%"


def _percent(row: pd.Series, name: str) -> str:
    spread = row[f"{name}_half_width"]
    return f"{100 * row[name]:.0f}" + ("" if pd.isna(spread) else f"±{100 * spread:.0f}")


def draw_attacks(summary: pd.DataFrame, folder: Path) -> None:
    """Draw attack.svg and attack.png in a folder: a panel for each attack, labels captured by the share of attackers.

    Args:
        summary: See `summarize_attacks`.
        folder: An existing folder.
    """
    attacks = summary[summary["share"] > 0]["attack"].unique().tolist()
    across = min(ACROSS, len(attacks))
    down = -(-len(attacks) // across)
    for ending in ("svg", "png"):
        path = folder / f"attack.{ending}"
        save(path, lambda canvas: _draw(canvas, summary, attacks, down, across), (3 * across + 0.6, 2.5 * down + 0.9))


def _draw(canvas: Canvas, summary: pd.DataFrame, attacks: list[str], down: int, across: int) -> None:
    panels = canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    elections = summary[["rule", "defence"]].drop_duplicates().to_numpy().tolist()
    for axes, attack in zip(panels, attacks, strict=False):
        for place, (rule, defence) in enumerate(elections):
            of_election = summary[(summary["rule"] == rule) & (summary["defence"] == defence)]
            rows = of_election[(of_election["attack"] == attack) | (of_election["share"] == 0)].sort_values("share")
            axes.errorbar(
                rows["share"],
                rows["captured"],
                yerr=rows["captured_half_width"].fillna(0),
                color=CLIENT_COLOURS[place % len(CLIENT_COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                linewidth=1.2,
                elinewidth=0.8,
                label=f"{rule}, {defence}",
            )
        axes.set_title(attack.replace("_", " "), fontsize=10, loc="left")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in panels[len(attacks) :]:
        axes.set_axis_off()
    canvas.supxlabel("malicious clients, of all", fontsize=10)
    canvas.supylabel("labels captured", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper left", ncols=4)
