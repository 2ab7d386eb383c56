"""A label table as text: how many labels are right, by how they are elected."""

from __future__ import annotations

import pandas as pd
from rich.text import Text

from semcons_ray.evaluation.bootstrap import NUM_RESAMPLES
from semcons_ray.metering.units import format_quantity
from semcons_ray.reporting.tables import format_interval, format_number
from semcons_ray.reporting.terminal import as_text, narrow_table

CATEGORY = "category: "
"""How names of columns begin that are of one category of prompts."""


def render_labels(table: pd.DataFrame, pairs: pd.DataFrame, left_out: int, *, width: int | None = None) -> str:
    """The labels of the last round that has some, as plain text, by default as wide as the terminal.

    Args:
        table: See `studies.labels.label_table`.
        pairs: See `studies.labels.joint_errors`.
        left_out: Prompts that no right answer is known to.
        width: Characters in a line.
    """
    rounds = table["round"].unique()
    table, pairs = table[table["round"] == rounds[-1]], pairs[pairs["round"] == rounds[-1]]
    cells = narrow_table(f"labels that are right, round {rounds[-1]}")
    categories = [name for name in map(str, table) if name.startswith(CATEGORY)]
    categories = categories if len(categories) > 1 else []
    shares = [name.removeprefix(CATEGORY) for name in categories]
    texts = ("rule", "competence", "defence")
    for heading in (*texts, "samples", "accuracy", "vs random client", "abstained", *shares, "up"):
        cells.add_column(heading, justify="left" if heading in texts else "right", overflow="fold")
    for _, row in table.iterrows():
        accuracy, difference = (format_interval(row, name, signed=name != "value") for name in ("value", "difference"))
        cells.add_row(
            *(Text(row[name] or "–") for name in texts),
            str(row["samples"]),
            *(text.replace(" [", "\n[") for text in (accuracy, difference)),
            format_number(row["abstained"], 2),
            *(format_number(row[name], 2) for name in categories),
            format_quantity(row["uplink_bytes"], "B"),
        )
    wrong = pairs[["both_wrong", "if_independent", "same_wrong"]].mean()
    lines = [
        f"Pairs of clients are both wrong at {wrong['both_wrong']:.1%} of prompts, where independent errors "
        f"would be at {wrong['if_independent']:.1%}, and give the same wrong answer at {wrong['same_wrong']:.1%}.",
        f"[95% intervals]: over prompts, by {NUM_RESAMPLES:,} bootstrap draws of as many. ±: over runs.",
        "random_client and own_answer are means over clients; any client, any draw: whether any answer is right.",
        "up: encoded bytes of all clients in a round, measured.",
    ]
    if len(rounds) > 1:
        lines.append(f"Rounds {', '.join(map(str, rounds[:-1]))} are in the table of --csv.")
    if left_out:
        lines.append(f"{left_out} prompts are left out, since no right answer to them is known.")
    return as_text(cells, Text(), *map(Text, lines), width=width).rstrip("\n")
