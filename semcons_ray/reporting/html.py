"""The report of a run: one HTML page that needs no network, no other file and no server.

The page's content security policy forbids every request and every script but its own, so a model's answer can neither
load nor run anything, even if it got past the escaping.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from semcons_ray.config import AlgorithmConfig, dump_yaml
from semcons_ray.distributed.placement import describe_clients
from semcons_ray.errors import RunFolderError
from semcons_ray.metering.ledger import split_gpus
from semcons_ray.metering.units import format_quantity
from semcons_ray.parts import BUILT_IN, STORED
from semcons_ray.reporting.drawing import Figure, client_colours
from semcons_ray.reporting.figures import draw_figures
from semcons_ray.reporting.intervals import INTERVALS
from semcons_ray.reporting.prompts import prompt_table
from semcons_ray.reporting.tables import (
    INTERVAL_NOTE,
    SHORT_NAMES,
    TASKS_NOTE,
    UNITS,
    Run,
    as_of,
    describe_measured,
    describe_untold,
    format_error,
    format_interval,
    format_number,
    format_seconds,
    format_usd,
    mean_by_round,
    metric_table,
    quality,
    read_run,
    short_model_name,
    task_table,
    telling,
    totals,
    work_by_stage,
)
from semcons_ray.runs.run_folder import LOSS_NAMES, write_file


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html anew, and return its path.

    Raises:
        RunFolderError: The run folder is missing, damaged or cannot be written.
    """
    path = folder / "report.html"
    page = render_report(read_run(folder))
    try:
        write_file(path, page)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror}") from error
    return path


def render_report(run: Run) -> str:
    """The report's HTML."""
    templates = resources.files("semcons_ray.reporting") / "templates"
    script = (templates / "report.js").read_text(encoding="utf-8")
    environment = page_environment()
    clients = quality(run.metrics)
    answered = prompt_table(run)
    virtual = None
    if run.config["federation"]["devices"]:  # its clock needs torch, which reports of other runs do without
        from semcons_ray.reporting.virtual_time import virtual_time

        virtual = virtual_time(run)
    return environment.get_template("report.html.j2").render(
        run=run,
        style=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=_script_hash(script),
        setting=describe_setting(run.config),
        headlines=headlines(run),
        clients=clients.reset_index().to_dict("records"),
        has_own_tests=f"own_{run.loss}" in run.metrics,
        loss=run.loss,
        loss_name=SHORT_NAMES[run.loss],
        as_of=as_of,
        untold=describe_untold(run),
        metrics=metric_table(run).to_dict("records"),
        intervals=INTERVALS,
        interval_note=INTERVAL_NOTE,
        tasks=task_table(run.metrics).reset_index().to_dict("records"),
        tasks_note=TASKS_NOTE,
        colours=client_colours(sorted(clients.index)),
        rounds=run.rounds.to_dict("records"),
        stages=work_by_stage(run.ledger).reset_index().to_dict("records"),
        totals=totals(run),
        energy_note=energy_note(run.placement, run.ledger),
        figures=_drawn(draw_figures(run)),
        virtual=virtual,
        virtual_figures=_drawn(virtual.figures if virtual else ()),
        tallies=run.tallies,
        answered=answered,
        config_yaml=dump_yaml(run.config),
        environment={key: value for key, value in run.environment.items() if not isinstance(value, (dict, list))},
        packages=run.environment.get("packages", {}),
        gpus=run.environment.get("gpus", []),
        workers=run.placement.get("workers", []),
    )


def _drawn(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{"svg": Markup(figure.svg), "figure": figure} for figure in figures]


def page_environment() -> Environment:
    """The environment of page templates: everything is escaped, and an undefined name is an error."""
    environment = Environment(
        loader=PackageLoader("semcons_ray.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number,
        interval=format_interval,
        error=format_error,
        quantity=format_quantity,
        seconds=format_seconds,
        usd=format_usd,
        short=short_model_name,
        hosted=describe_clients,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return environment


def describe_setting(config: Mapping[str, Any]) -> str:
    """The experiment in a few sentences, from its settings."""
    data, training, model, algorithm = config["data"], config["training"], config["model"], config["algorithm"]
    count, mix, prompts = config["clients"]["num_clients"], config["clients"]["mix"], config["prompts"]
    names = " and ".join(short_model_name(name) for name in mix) if mix else short_model_name(model["name"])
    skew = f" with α = {data['dirichlet_alpha']:g}" if data["partition"] in ("dirichlet", "quantity") else ""
    steps = training["local_steps"]
    length = _count(steps, "step") if steps else _count(training["local_epochs"], "epoch")
    took_part = config["clients"]["participation"]
    sampled = f" {took_part:.0%} of the clients take part in a round." if took_part < 1 else ""
    overridden = ", ".join(sorted(map(str, config["clients"].get("overrides", {})), key=int))
    sampled += f" Some clients have training or generation settings of their own: {overridden}." if overridden else ""
    closed = [name for name in config["clients"].get("models", {}) if name in (mix or [model["name"]])]
    sampled += f" Answers of {' and '.join(closed)} come from elsewhere." if closed else ""
    sentence = (
        f"{_count(count, 'client')} fine-tune{'s' if count == 1 else ''} {names} (LoRA, rank {model['lora']['rank']}) "
        f"on {_count(data['examples_per_client'], 'private example')} each of {data['source']}, "
        f"partition {data['partition']}{skew}, {length} a round for {_count(config['num_rounds'], 'round')}.{sampled} "
    )
    own = " Clients also learn their own answers to the public prompts." if algorithm["self_labels"] else ""
    if algorithm["name"] == "local_only":
        return sentence + f"Training is local only: nothing is exchanged.{own} Seed {config['seed']}."
    if algorithm["name"] == "centralized":
        return sentence + f"Training is centralised: client 0 is given all private data. Seed {config['seed']}."
    named = _with_options(algorithm["name"], algorithm["options"])
    if algorithm["name"] not in BUILT_IN["algorithm"]:
        rule = _with_options(algorithm["rule"], algorithm["rule_options"])
        return sentence + f"They do as {named} says; where it elects answers, by {rule}. Seed {config['seed']}."
    stored = AlgorithmConfig.model_validate(algorithm, context={STORED: True})
    rounds = stored.exchanges(config["num_rounds"])
    begins = f"From round {rounds.start} on they" if rounds.start > 1 else "They"
    public = f"{_count(prompts['budget'], 'public prompt')} ({prompts['selection']})"
    if algorithm["name"] == "logit_exchange":
        return sentence + f"{begins} exchange token probabilities of answers to {public}. Seed {config['seed']}."
    if algorithm["name"] != "semantic_consensus":
        weights = f"Adapters are exchanged in {algorithm['weight_dtype']}"
        return sentence + f"{weights}, by the algorithm {named}.{own} Seed {config['seed']}."
    if algorithm["rule"] == "own_answer":
        return sentence + f"Each learns its own answers to {public}; nothing is exchanged. Seed {config['seed']}."
    threshold = algorithm["agreement_threshold"]
    under = "" if threshold is None else f" or an agreement of {threshold:g}"
    abstains = f"and abstains under {_count(algorithm['min_votes'], 'answer')}{under}"
    rule = _with_options(algorithm["rule"].replace("_", " "), algorithm["rule_options"])
    return sentence + (
        f"{begins} answer {public}; by the {rule} rule the server keeps one answer to each as a pseudo-label, "
        f"{abstains}. Seed {config['seed']}."
    )


def _with_options(name: str, options: Mapping[str, Any]) -> str:
    """The name of a part, with its options."""
    listed = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{name} ({listed})" if listed else name


def headlines(run: Run) -> list[dict[str, str]]:
    """The numbers at the top of the page, each with label, value and note."""
    cost = totals(run)
    total = cost.uplink_bytes + cost.downlink_bytes
    up, down = format_quantity(cost.uplink_bytes, "B"), format_quantity(cost.downlink_bytes, "B")
    known = cost.energy_source != "unavailable"
    rows = [
        _loss_headline(run),
        _clients_headline(run),
        ("On the wire", format_quantity(total, "B") if total else "nothing", f"{up} up, {down} down, measured"),
        ("Energy", format_quantity(cost.joules, "J") if known else "unavailable",
         cost.energy_source if known else "no counter and no estimate"),
        ("Wall time", format_seconds(cost.wall_seconds),
         f"set-up {format_seconds(cost.setup_seconds)} of it, measured"),
        *([("Paid", format_usd(cost.usd), "for work done elsewhere, as its provider counts it")] if cost.usd else []),
    ]  # fmt: skip
    return [{"label": label, "value": value, "note": note} for label, value, note in rows]


def _loss_headline(run: Run) -> tuple[str, str, str]:
    mean, name, unit = mean_by_round(run.metrics, run.loss), f"Mean {LOSS_NAMES[run.loss]}", UNITS[run.loss]
    if mean.empty:
        return name, "not known", describe_untold(run) or "not measured"
    first, last, since = mean.iloc[0], mean.iloc[-1], "base" if mean.index[0] == 0 else f"round {mean.index[0]}"
    if len(mean) == 1:
        return f"{name}, {since}", format_number(last), f"{unit}, measured"
    note = f"{format_number(100 * (last / first - 1), 1, signed=True)}%, {unit}, measured"
    return (
        f"{name}, {since} → round {mean.index[-1]}",
        f"{format_number(first)} → {format_number(last)}",
        "; ".join(filter(None, [note, describe_measured(run), describe_untold(run)])),
    )


def _clients_headline(run: Run) -> tuple[str, str, str]:
    name, change = f"Clients with lower {LOSS_NAMES[run.loss]}", quality(run.metrics)[f"change_{run.loss}"]
    measured = {int(str(client)): float(value) for client, value in change.dropna().items()}
    if not measured:
        return name, "–", "not measured"
    best, worst = min(measured, key=lambda c: measured[c]), max(measured, key=lambda c: measured[c])
    untold = run.metrics["client_id"].nunique() - telling(run.metrics, "nll")["client_id"].nunique()
    value = f"{sum(by < 0 for by in measured.values())} of {run.config['clients']['num_clients'] - untold}"
    note = f"{format_number(measured[best], signed=True)} (client {best})"
    if len(measured) > 1:
        note = f"from {note} to {format_number(measured[worst], signed=True)} (client {worst})"
    return name, value, note


def energy_note(placement: Mapping[str, Any], ledger: pd.DataFrame) -> str:
    """A sentence on the energy meters of the run's machines, and on who shared them."""
    meters: Mapping[str, str] = placement.get("energy_meters", {})
    named = sorted({name for name in meters.values() if name})
    without = sum(not name for name in meters.values())
    parts = [f"metered by {', '.join(named)}"] if named else []
    if any(worker.get("elsewhere") for worker in placement.get("workers", ())):
        parts.append("nothing is known of the energy of work done elsewhere")
    if without:
        parts.append(f"{_count(without, 'machine')} without an energy counter, where joules are estimated")
    if named and not any("rapl" in name for name in named):
        parts.append("the CPU's own energy is not counted where GPUs alone are metered")
    had = ledger.assign(gpu=ledger["gpus"].map(split_gpus)).explode("gpu")
    if (had.groupby("gpu")["worker"].nunique() > 1).any():
        parts.append("the joules of a GPU that several workers had are shared out among them by busy time")
    if not placement.get("alone", True):
        parts.append(
            "other runs went on beside this one, so counters that they shared are left out and their part is estimated "
            "(energy.exclusive)"
        )
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
