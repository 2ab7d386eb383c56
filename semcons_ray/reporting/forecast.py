"""What runs would do and need, as text: data, placement, bytes, tokens and hours.

Hours follow from the speed of a batch of each kind of work, which is measured where a model is there and loads quickly;
where it is not, only the number of operations is told.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from textwrap import indent

import pandas as pd
from rich.console import Console, RenderableType
from rich.table import Table

from semcons_ray.config import changed_settings, dump_yaml
from semcons_ray.metering.units import format_quantity
from semcons_ray.parts import BUILT_IN
from semcons_ray.reporting.tables import format_seconds
from semcons_ray.reporting.terminal import print_whole
from semcons_ray.runs.forecast import Forecast, Load, Speed

LISTED_ROUNDS = 10
"""With more rounds, they are not listed one by one."""

HEADINGS = {
    "uplink_bytes": ("bytes up", "B"),
    "downlink_bytes": ("bytes down", "B"),
    "trained": ("tokens trained", ""),
    "generated": ("generated", ""),
    "scored": ("scored", ""),
}
"""Columns of a table of loads: heading and unit."""

ESTIMATED = (
    "The rest is estimated: answers as long as the data's own, up to generation.max_new_tokens, a pseudo-label for "
    "each prompt, weights not compressed, nobody left out. Tokens trained and scored include those of prompts."
)

OWN = (
    "An algorithm of your own is taken to send answers as semantic_consensus does if it says forms_consensus, token "
    "probabilities as logit_exchange does if it says exchanges_tokens, weights as fedavg_lora does if it says "
    "averages_weights, and else nothing."
)


def loads_of_rounds(forecast: Forecast) -> pd.DataFrame:
    """What a run would send and compute: a row for the base model and for each round, or for their average, and one for
    all. Index: what it is; columns: those of `Load`."""
    first, *later = forecast.rounds
    rows = {"base model": first}
    if len(later) <= LISTED_ROUNDS:
        rows |= {f"round {round}": load for round, load in enumerate(later, start=1)}
    else:
        rows["a round, on average"] = sum(later, Load()) * (1 / len(later))
    return _table_of({**rows, "total": forecast.total})


def loads_of_runs(forecasts: Mapping[str, Forecast], times: int) -> pd.DataFrame:
    """The same for many runs: a row for each, and one for all, each done `times` times."""
    rows = {label: forecast.total for label, forecast in forecasts.items()}
    total = sum(rows.values(), Load()) * times
    number = f"{len(rows)} runs" if times == 1 else f"{times} x {len(rows)} runs"
    return _table_of({**rows, number: total})


def _table_of(rows: Mapping[str, Load]) -> pd.DataFrame:
    return pd.DataFrame([asdict(load) for load in rows.values()], index=[*rows])


def render_forecast(forecast: Forecast, speed: Speed | str) -> str:
    """What a run would do, as text as wide as the terminal.

    Args:
        forecast: What it would send and compute.
        speed: The speed of a worker, or why it is not known.
    """
    exact = f"Exact: {format_quantity(forecast.prompt_bytes, 'B')} of public prompts for a client. {ESTIMATED}"
    sections = [f"{heading}:\n{indent(text.strip(), '  ')}\n" for heading, text in _sections(forecast)]
    others = ", ".join(forecast.config.other_models)
    unknown = [f"Tokens, time and cost of {others} are not known here."] if others else []
    unknown += [OWN] if forecast.config.algorithm.name not in BUILT_IN["algorithm"] else []
    return _text(*sections, _table(loads_of_rounds(forecast)), f"\n{exact}", *unknown, _duration([forecast], speed))


def render_forecasts(forecasts: Mapping[str, Forecast], times: int, speed: Speed | str) -> str:
    """What many runs would do, by their labels, if each is done `times` times; see `render_forecast`."""
    duration = _duration([*forecasts.values()] * times, speed)
    return _text(_table(loads_of_runs(forecasts, times)), f"\n{ESTIMATED}", duration)


def _text(*parts: RenderableType) -> str:
    stream = io.StringIO()
    width = shutil.get_terminal_size((120, 24)).columns
    console = Console(file=stream, highlight=False, markup=False, soft_wrap=True, width=width, force_jupyter=False)
    for part in parts:
        if isinstance(part, Table):
            print_whole(console, part)
        else:
            console.print(part)
    return stream.getvalue().rstrip("\n")


def _sections(forecast: Forecast) -> Iterator[tuple[str, str]]:
    """Headings, each with its text."""
    plan = forecast.plan
    yield "settings that differ from the defaults", dump_yaml(changed_settings(forecast.config))
    shares = []
    for size, group in groupby(enumerate(plan.split.num_private), key=lambda share: share[1]):
        clients = [client for client, _ in group]
        shares.append(f"client {clients[0]}: {size}" if len(clients) == 1 else
                      f"clients {clients[0]} to {clients[-1]}: {size} each")  # fmt: skip
    numbers = [*shares, f"public prompts: {len(plan.split.public)}", f"test set: {len(plan.split.test)}"]
    if plan.split.client_test:
        numbers.append(f"clients' own test sets: {sum(map(len, plan.split.client_test))}")
    yield "data", "\n".join([*map(str, plan.tallies), f"examples of {'; '.join(numbers)}"])
    yield "placement", plan.described


def _table(loads: pd.DataFrame) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for heading, _ in HEADINGS.values():
        table.add_column(heading, justify="right", overflow="fold")
    for label, row in loads.iterrows():
        cells = [format_quantity(round(row[column]), unit).strip() for column, (_, unit) in HEADINGS.items()]
        table.add_row(str(label), *cells)
    return table


def _duration(forecasts: Sequence[Forecast], speed: Speed | str) -> str:
    """How long runs take, one after another."""
    operations = sum(forecast.operations for forecast in forecasts)
    work = f"{operations:.2g} floating-point operations"
    if isinstance(speed, str):
        return f"Time: not known, since {speed}; {work}"
    seconds = sum(forecast.seconds(speed) for forecast in forecasts)
    rates = f"{speed.trained:,.0f} tokens/s trained, {speed.generated:,.0f} generated, {speed.scored:,.0f} scored"
    return (
        f"Time: about {format_seconds(seconds)}{', one after another' if len(forecasts) > 1 else ''}; {work}, at "
        f"{rates} by one worker alone, measured now on this machine. Loading, embedding, messages and lm-eval are not "
        "counted, and workers that share a machine are slower."
    )
