"""Figures of a run as SVG, for the HTML page; the title of each states its finding."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from semcons_ray.metering.units import format_quantity, scale
from semcons_ray.reporting.drawing import (
    BLUE,
    CLIENT_COLOURS,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    SKY,
    STAGE_COLOURS,
    STAGE_NAMES,
    Figure,
    client_colours,
    few,
    place_legend,
    render,
    round_axis,
    stacked_bars,
    stage_label,
)
from semcons_ray.reporting.tables import (
    Run,
    agreement,
    by_round_and_stage,
    bytes_by_round,
    describe_measured,
    energy,
    format_number,
    held_by_round,
    mean_by_round,
    metric_by_round,
    short_model_name,
    wins,
)
from semcons_ray.reporting.timeline import timeline_figure
from semcons_ray.runs.run_folder import LOSS_NAMES

DASHES = ("-", "--", ":", "-.")
MAX_LINES = 100
"""With more clients, a figure shades where most of them are, instead of drawing a line for each."""
SHADES = ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35))
"""Quantiles over clients between which it shades, and how opaquely."""
QUALITY = {
    "bits_per_byte": (
        LOSS_NAMES["bits_per_byte"],
        "Bits that the reference answers take under a client's model, over their bytes as UTF-8, which compares models "
        "with different tokenizers",
    ),
    "nll": (LOSS_NAMES["nll"], "Mean negative log-likelihood of the reference answers (nats a token)"),
    "rouge_l": ("ROUGE-L", "ROUGE-L F-measure of answers to test prompts (0 to 1)"),
    "similarity": ("similarity", "Cosine of answers to the references, by the server's embedding model"),
}


def draw_figures(run: Run) -> list[Figure]:
    """All figures that the run has numbers for, in the order to read them in."""
    # With one model, bits per byte would have the same curves as NLL.
    drawn = [quality_figure(run, metric) for metric in QUALITY if metric != "bits_per_byte" or metric == run.loss]
    if not run.consensus.empty:
        elected = run.config["algorithm"]["rule"] != "reference"
        drawn += [wins_figure(run) if elected else None, agreement_figure(run), churn_figure(run)]
    drawn += [bytes_figure(run), energy_figure(run), timeline_figure(run)]
    return [figure for figure in drawn if figure]


def quality_figure(run: Run, metric: str) -> Figure | None:
    """A metric by round and client, and its mean where it has one; None if it was never measured."""
    label, caption = QUALITY[metric]
    values, mean = metric_by_round(run.metrics, metric), mean_by_round(run.metrics, metric)
    if values.empty:
        return None
    model_of: dict[int, str] = dict(zip(run.metrics["client_id"], run.metrics["model"], strict=True))
    clients, models = [*values.dropna(axis="columns", how="all")], sorted(set(model_of.values()))
    colours, distinct = client_colours(clients), few(clients)
    has_mean = len(clients) > 1 and not mean.empty
    many = len(clients) > MAX_LINES

    def shade(axes: Axes) -> None:
        held = held_by_round(run.metrics, metric)
        for position, model in enumerate(models):
            theirs = held[[client for client in clients if model_of[client] == model]]
            colour = CLIENT_COLOURS[position % len(CLIENT_COLOURS)]
            for low, high, opacity in SHADES:
                lower, upper = theirs.quantile(low, axis="columns"), theirs.quantile(high, axis="columns")
                axes.fill_between(held.index, lower, upper, color=colour, alpha=opacity, linewidth=0)
            if len(models) > 1:
                middle = theirs.median(axis="columns")
                axes.plot(held.index, middle, color=colour, label=f"median of {short_model_name(model)}")

    def draw_lines(axes: Axes) -> None:
        for position, client in enumerate(clients):
            measured = values[client].dropna()
            name = f"{client} · {short_model_name(model_of[client])}" if len(models) > 1 else f"client {client}"
            axes.plot(
                measured.index,
                measured,
                color=colours[client],
                linestyle=DASHES[models.index(model_of[client]) % len(DASHES)],
                marker=MARKERS[position] if distinct else "",
                linewidth=1.6 if distinct else 0.8,
                alpha=1 if distinct else 0.7,
                label=name if distinct else None,
            )

    def draw(axes: Axes, canvas: Canvas) -> None:
        shade(axes) if many else draw_lines(axes)
        if has_mean:
            axes.plot(mean.index, mean, color=INK, linewidth=2.6, label="mean", zorder=1 if distinct else 3)
        axes.set_ylabel(label)
        round_axis(axes, values.index)
        place_legend(canvas, axes, 5 if len(models) == 1 else 2)

    caption += ", measured. Round 0 is the base model."
    if has_mean:
        caption += " The thick line is the mean over clients"
        caption += "." if distinct or many else f", thin lines are all {len(clients)}."
        if measured := describe_measured(run):
            caption += f" {measured}; others count with their last measurement."
    if many:
        caption += f" The dark band holds the middle half of {len(clients):,} clients, the light one the middle 90%"
        caption += ", each with its last measurement."
    if metric == "nll" and metric != run.loss:
        caption += " Models differ in their tokens, so compare levels within a model only."
    name = label[0].upper() + label[1:]
    if mean.empty:
        title = f"{name} of each client"
    else:
        title = _quality_title(mean, f"Mean {label}" if has_mean else name, lower_is_better=metric in LOSS_NAMES)
    return Figure(metric, title, caption, render(metric, title, draw))


def _quality_title(mean: pd.Series[float], name: str, *, lower_is_better: bool) -> str:
    first, last = float(mean.iloc[0]), float(mean.iloc[-1])
    digits = 2 if abs(first - last) >= 0.02 else 3
    at_last = format_number(last, digits)
    if math.isnan(last):
        return f"{name} is no number after round {mean.index[-1]}"
    if len(mean) == 1:
        return f"{name} is {at_last}"
    if format_number(first, digits) == at_last:
        title = f"{name} stayed at {at_last}"
    else:
        title = f"{name} {'fell' if last < first else 'rose'} from {format_number(first, digits)} to {at_last}"
    best = float(mean.min() if lower_is_better else mean.max())
    if format_number(best, digits) == at_last or best == first:
        return title
    return f"{title}; best after round {mean.index[mean == best][0]} ({format_number(best, digits)})"


def wins_figure(run: Run) -> Figure:
    """How many prompts each client won, by round."""
    table = wins(run.consensus)
    clients = sorted(set(run.metrics["client_id"]) | set(run.consensus["client_id"]))
    table = table.reindex(clients, fill_value=0)
    prompts = run.consensus.groupby("round")["prompt_id"].nunique()
    colours, distinct = client_colours(clients), few(clients)

    def draw_bars(axes: Axes, canvas: Canvas) -> None:
        parts = {f"client {client}": (table.loc[client], colours[client]) for client in clients}
        unlabelled = prompts - table.sum()
        if unlabelled.any():
            parts["no pseudo-label"] = (unlabelled, GREY)
        stacked_bars(axes, parts)
        axes.set_ylabel("public prompts")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        place_legend(canvas, axes, 5)

    def draw_map(axes: Axes, canvas: Canvas) -> None:
        image = axes.imshow(table.to_numpy(), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        axes.grid(False)
        axes.set_ylabel("client")
        axes.set_xlabel("round")
        across, down = math.ceil(table.shape[1] / 12), math.ceil(len(clients) / 12)
        axes.set_xticks(range(0, table.shape[1], across), [str(round) for round in table.columns[::across]])
        axes.set_yticks(range(0, len(clients), down), [str(client) for client in clients[::down]])
        canvas.colorbar(image, ax=axes, label="prompts won", ticks=MaxNLocator(6, integer=True))

    round = int(table.columns[-1])
    last = {client: int(count) for client, count in zip(clients, table[round], strict=True)}
    most = max(last.values())
    won = f"{most} of {prompts.iloc[-1]} prompts in round {round}"
    if most == 0:
        title = f"No prompt gave a pseudo-label in round {round}"
    elif len(clients) > 1 and most <= 1.5 * sum(last.values()) / len(clients):
        title = f"Wins are spread: no client won more than {won}"
    else:
        title = f"Client {next(client for client in clients if last[client] == most)} won {won}"
    caption = (
        "Public prompts whose pseudo-label is a client's answer, measured. Even shares would be "
        f"{prompts.iloc[-1] / len(clients):.3g} prompts a client. "
        "Ties, as between equal answers, are drawn."
    )
    height = 3.4 if distinct else min(3.4 + 0.03 * len(clients), 6.0)
    return Figure("wins", title, caption, render("wins", title, draw_bars if distinct else draw_map, (5.8, height)))


def agreement_figure(run: Run) -> Figure | None:
    """The distribution of agreement over prompts, by round; None if no prompt had two answers."""
    table = agreement(run.consensus).dropna(subset="mean")
    if table.empty:
        return None
    threshold = run.config["algorithm"]["agreement_threshold"]

    def draw(axes: Axes, canvas: Canvas) -> None:
        boxes = [
            {"whislo": row["q10"], "q1": row["q25"], "med": row["q50"], "q3": row["q75"], "whishi": row["q90"]}
            for row in table.to_dict("records")
        ]
        axes.bxp(
            boxes,
            positions=table.index.tolist(),
            widths=0.5,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": SKY, "edgecolor": BLUE, "alpha": 0.6},
            medianprops={"color": INK, "linewidth": 2},
            whiskerprops={"color": BLUE},
            capprops={"color": BLUE},
        )
        axes.plot(table.index, table["mean"], color=ORANGE, marker="D", linestyle="none", label="mean")
        if threshold is not None:
            axes.axhline(threshold, color=ORANGE, linestyle="--", linewidth=1.2, label=f"threshold {threshold:g}")
        axes.set_ylabel("agreement (cosine)")
        round_axis(axes, table.index, margin=0.6)
        place_legend(canvas, axes, 3)

    first, last = format_number(table["mean"].iloc[0], 2), format_number(table["mean"].iloc[-1], 2)
    if first == last:
        title = f"Clients agree at a mean cosine of {last}"
    else:
        verb = "rose" if table["mean"].iloc[-1] > table["mean"].iloc[0] else "fell"
        title = f"Mean agreement {verb} from {first} to {last}"
    caption = (
        "Agreement of the chosen answer with the others, over public prompts with two answers at least, measured: line "
        "at the median, box from the 25th to the 75th percentile, whiskers at the 10th and the 90th."
    )
    return Figure("agreement", title, caption, render("agreement", title, draw))


def churn_figure(run: Run) -> Figure:
    """How many pseudo-labels changed or are missing, by round."""
    abstained = 100 * agreement(run.consensus)["abstained"]
    churn = 100 * run.rounds.set_index("round")["label_churn"].dropna()

    def draw(axes: Axes, canvas: Canvas) -> None:
        if len(churn):
            axes.plot(churn.index, churn, color=ORANGE, marker="o", label="label changed since the round before")
        axes.plot(abstained.index, abstained, color=BLUE, marker="s", linestyle="--", label="no pseudo-label")
        axes.set_ylim(-3, 103)
        axes.set_ylabel("public prompts (%)")
        round_axis(axes, abstained.index)
        place_legend(canvas, axes, 2)

    if len(churn):
        title = f"The pseudo-label of {churn.iloc[-1]:.0f}% of prompts changed in round {churn.index[-1]}"
    else:
        title = f"{abstained.iloc[-1]:.0f}% of prompts gave no pseudo-label in round {abstained.index[-1]}"
    caption = (
        "Label churn, the share of public prompts whose pseudo-label is not what it was a round before (first known "
        "in round 2), and the share that gave none; measured. Zero churn means that labels settled, not that they are "
        "right."
    )
    return Figure("churn", title, caption, render("churn", title, draw))


def bytes_figure(run: Run) -> Figure | None:
    """Bytes on the wire by round; None if nothing crossed it."""
    table = bytes_by_round(run.ledger)
    total = table["total_bytes"].sum()
    if total == 0:
        return None
    divisor, unit = scale(float(table["total_bytes"].max()), "B")

    def draw(axes: Axes, canvas: Canvas) -> None:
        parts = {
            "uplink": (table["uplink_bytes"] / divisor, BLUE),
            "downlink": (table["downlink_bytes"] / divisor, "#E69F00"),
        }
        stacked_bars(axes, parts)
        axes.set_ylabel(f"all clients ({unit})")
        place_legend(canvas, axes, 2)

    title = f"{format_quantity(total / len(table), 'B')} a round crossed the wire"
    caption = (
        f"Length of encoded messages, all clients together, measured; {format_quantity(total, 'B')} over the run "
        f"(kB = 1000 B). Compression: {run.config['algorithm']['compression']}."
    )
    return Figure("bytes", title, caption, render("bytes", title, draw))


def energy_figure(run: Run) -> Figure | None:
    """Joules by round and stage; None if energy is unavailable."""
    joules, source = energy(run.ledger)
    if not joules > 0:
        return None
    table = by_round_and_stage(run.ledger, "energy_joules")
    table = table.loc[:, table.sum() > 0]
    divisor, unit = scale(float(table.sum(axis="columns").max()), "J")

    def draw(axes: Axes, canvas: Canvas) -> None:
        stages = [str(stage) for stage in table]
        stacked_bars(axes, {stage_label(stage): (table[stage] / divisor, STAGE_COLOURS[stage]) for stage in stages})
        axes.set_ylabel(f"energy ({unit})")
        place_legend(canvas, axes, 4)

    top = str(table.sum().idxmax())
    share = table[top].sum() / joules
    title = f"{STAGE_NAMES.get(top, top)} took {share:.0%} of {format_quantity(joules, 'J')} ({source})"
    caption = f"Energy by round and kind of work, {source}. Round 0 is set-up."
    return Figure("energy", title, caption, render("energy", title, draw))
