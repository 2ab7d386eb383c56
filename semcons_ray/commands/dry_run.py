"""`--dry-run`: prints what a run would do and need, without starting it.

Data is read and divided, models are found and checked, and everything is placed, as a run does it, so what a run would
refuse is refused. Hours follow from the speed of a batch of each kind of work, which is measured where a model is there
and loads quickly; where it is not, only the number of operations is told.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from itertools import groupby
from textwrap import indent

from rich.console import Console
from rich.table import Table

from semcons_ray.commands.forecast import Forecast, Load, Speed
from semcons_ray.commands.progress import Progress
from semcons_ray.config import ExperimentConfig, changed_settings, dump_yaml
from semcons_ray.metering.units import format_quantity
from semcons_ray.parts import BUILT_IN
from semcons_ray.reporting.tables import format_seconds
from semcons_ray.reporting.terminal import print_whole
from semcons_ray.runs.assembly import LARGE_PARAMETERS, cluster
from semcons_ray.runs.experiment import plan_experiment

MEASURED_TOKENS = 16
"""Tokens of an answer when the speed of answering is measured."""

LISTED_ROUNDS = 10
"""With more rounds, they are not listed one by one."""

ESTIMATED = (
    "The rest is estimated: answers as long as the data's own, up to generation.max_new_tokens, a pseudo-label for "
    "each prompt, weights not compressed, nobody left out. Tokens trained and scored include those of prompts."
)


OWN = (
    "An algorithm of your own is taken to send answers as semantic_consensus does if it says forms_consensus, weights "
    "as fedavg_lora does if it says averages_weights, and else nothing."
)


class Stages(Progress):
    """Shows the stages of a dry run, but not the plan, which is part of the result."""

    def planned(self, text: str) -> None:
        """Say nothing."""


def run(config: ExperimentConfig) -> None:
    """Print what a run would do, on stdout.

    Raises:
        UserError: The run would be refused.
    """
    with Stages() as progress:
        plan = plan_experiment(config, progress)
        progress.stage("counting tokens")
        forecast = Forecast(plan)
        progress.stage("measuring the speed of a batch")
        speed = measure(forecast)
    console = _console()
    for heading, text in _sections(forecast):
        console.print(f"{heading}:\n{indent(text.strip(), '  ')}\n")
    first, *later = forecast.rounds
    rows = [("base model", first)]
    if len(later) <= LISTED_ROUNDS:
        rows += [(f"round {round}", load) for round, load in enumerate(later, start=1)]
    else:
        rows.append(("a round, on average", sum(later, Load()) * (1 / len(later))))
    print_whole(console, _table([*rows, ("total", forecast.total)]))
    console.print(f"\nExact: {format_quantity(forecast.prompt_bytes, 'B')} of public prompts for a client. {ESTIMATED}")
    if others := ", ".join(forecast.config.other_models):
        console.print(f"Tokens, time and cost of {others} are not known here.")
    if config.algorithm.name not in BUILT_IN["algorithm"]:
        console.print(OWN)
    console.print(_duration([forecast], speed))


def run_many(runs: Sequence[tuple[str, ExperimentConfig]], times: int) -> None:
    """Print what many runs would do, a row for each.

    Args:
        runs: Their labels and settings.
        times: How often each is done.

    Raises:
        UserError: One would be refused.
    """
    forecasts: dict[str, Forecast] = {}
    with Stages() as progress, cluster(runs[0][1]) as nodes:
        for label, config in runs:
            progress.stage(label)
            forecasts[label] = Forecast(plan_experiment(config, progress, nodes))
        progress.stage("measuring the speed of a batch")
        speed = measure(next(iter(forecasts.values())))
    rows = [(label, forecast.total) for label, forecast in forecasts.items()]
    total = sum((load for _, load in rows), Load())
    number = f"{len(rows)} runs" if times == 1 else f"{times} x {len(rows)} runs"
    console = _console()
    print_whole(console, _table([*rows, (number, total * times)]))
    console.print(f"\n{ESTIMATED}")
    console.print(_duration([*forecasts.values()] * times, speed))


def measure(forecast: Forecast) -> Speed | str:
    """The speed of one worker on this machine, by a batch of each kind of work with the smallest model.

    Returns:
        The speed, or why it is not measured.
    """
    config, parameters = forecast.config, forecast.parameters
    if not parameters:
        return "all answers come from elsewhere"
    name = min(parameters, key=parameters.__getitem__)
    if config.generation.engine != "transformers" or config.sharding.models:
        return "generation engines and divided models are not measured"
    if config.resources.device == "cpu" and parameters[name] > LARGE_PARAMETERS:
        return f"on a CPU, {name} is not measured"
    import numpy as np
    import torch

    from semcons_ray.modeling.client_model import Pair
    from semcons_ray.modeling.language_model import LanguageModel

    if config.resources.device == "cuda" and not torch.cuda.is_available():
        return "this machine has no GPU"
    torch.set_num_threads(config.resources.threads_per_worker)
    folder, device = str(forecast.plan.models[name]), config.resources.device
    model = LanguageModel.of(config.model, folder, device=device, trainings=[config.training])
    training = config.training.model_copy(update={"local_steps": 1, "gradient_accumulation_steps": 1})
    generation = config.generation.model_copy(update={"max_new_tokens": MEASURED_TOKENS})
    pairs = [Pair(example.prompt, example.response) for example in forecast.private]
    batch, asked = pairs[: training.batch_size], [pair.prompt for pair in pairs[: generation.batch_size]]

    def rate(work: Callable[[], int]) -> float:
        began = time.perf_counter()
        return work() / (time.perf_counter() - began)

    adapter, random = model.fresh_adapter(), np.random.default_rng(0)
    return Speed(
        generated=rate(lambda: model.generate(adapter, asked, generation, random)[1]),
        scored=rate(lambda: model.negative_log_likelihood(adapter, batch, len(batch)).processed_tokens),
        trained=rate(lambda: model.fine_tune(adapter, batch, training, random).tokens),
        parameters=parameters[name],
    )


def _console() -> Console:
    width = shutil.get_terminal_size((120, 24)).columns
    return Console(highlight=False, markup=False, soft_wrap=True, width=width)


def _sections(forecast: Forecast) -> Iterator[tuple[str, str]]:
    """Headings, each with its text."""
    plan = forecast.plan
    yield "settings that differ from the defaults", dump_yaml(changed_settings(forecast.config))
    shares = []
    for size, group in groupby(enumerate(plan.split.private), key=lambda share: len(share[1])):
        clients = [client for client, _ in group]
        shares.append(f"client {clients[0]}: {size}" if len(clients) == 1 else
                      f"clients {clients[0]} to {clients[-1]}: {size} each")  # fmt: skip
    numbers = [*shares, f"public prompts: {len(plan.split.public)}", f"test set: {len(plan.split.test)}"]
    if plan.split.client_test:
        numbers.append(f"clients' own test sets: {sum(map(len, plan.split.client_test))}")
    yield "data", "\n".join([*map(str, plan.tallies), f"examples of {'; '.join(numbers)}"])
    yield "placement", plan.described


def _table(rows: Sequence[tuple[str, Load]]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    headings = {"bytes up": "B", "bytes down": "B", "tokens trained": "", "generated": "", "scored": ""}
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for label, load in rows:
        cells = zip(astuple(load), headings.values(), strict=True)
        table.add_row(label, *(format_quantity(round(value), unit).strip() for value, unit in cells))
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
