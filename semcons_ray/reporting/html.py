"""A run as one HTML page that needs nothing else: no network, no other file, no server.

The page's content security policy forbids every request and every script but its own, so an answer that a model made
up can neither load nor run anything, even if it slipped past the escaping.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from semcons_ray.errors import RunFolderError
from semcons_ray.reporting.figures import client_colours, draw_figures
from semcons_ray.reporting.prompts import prompt_table
from semcons_ray.reporting.tables import (
    Run,
    format_number,
    format_quantity,
    format_seconds,
    mean_by_round,
    quality,
    read_run,
    short_model_name,
    totals,
    work_by_stage,
)


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html anew, and return its path.

    Raises:
        RunFolderError: The run folder is missing, damaged or cannot be written.
    """
    path = folder / "report.html"
    page = render_report(read_run(folder))
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror}") from error
    return path


def render_report(run: Run) -> str:
    """The page's HTML."""
    templates = resources.files("semcons_ray.reporting") / "templates"
    script = (templates / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("semcons_ray.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number, quantity=format_quantity, seconds=format_seconds, short=short_model_name
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    clients = quality(run.metrics)
    answered = prompt_table(run)
    return environment.get_template("report.html.j2").render(
        run=run,
        style=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=_script_hash(script),
        setting=describe_setting(run.config),
        headlines=headlines(run),
        clients=clients.reset_index().to_dict("records"),
        newest=clients["last_round"].max(),
        colours=client_colours(sorted(clients.index)),
        rounds=run.rounds.to_dict("records"),
        stages=work_by_stage(run.ledger).reset_index().to_dict("records"),
        totals=totals(run),
        energy_note=energy_note(run.placement),
        figures=[{"svg": Markup(figure.svg), "figure": figure} for figure in draw_figures(run)],
        answered=answered,
        config_yaml=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        environment={key: value for key, value in run.environment.items() if not isinstance(value, (dict, list))},
        packages=run.environment.get("packages", {}),
        gpus=run.environment.get("gpus", []),
        workers=run.placement.get("workers", []),
    )


def describe_setting(config: Mapping[str, Any]) -> str:
    """The experiment in a sentence or two, from its config."""
    data, training, model, algorithm = config["data"], config["training"], config["model"], config["algorithm"]
    count, mix, prompts = config["clients"]["num_clients"], config["clients"]["mix"], config["prompts"]
    names = " and ".join(short_model_name(name) for name in mix) if mix else short_model_name(model["name"])
    skew = f" with α = {data['dirichlet_alpha']:g}" if data["partition"] in ("dirichlet", "quantity") else ""
    steps = training["local_steps"]
    length = _count(steps, "step") if steps else _count(training["local_epochs"], "epoch")
    took_part = config["clients"]["participation"]
    sampled = f" {took_part:.0%} of the clients take part in a round." if took_part < 1 else ""
    sentence = (
        f"{_count(count, 'client')} fine-tune{'s' if count == 1 else ''} {names} (LoRA, rank {model['lora']['rank']}) on "
        f"{_count(data['examples_per_client'], 'private example')} each of {data['source']}, partition {data['partition']}"
        f"{skew}, {length} a round for {_count(config['num_rounds'], 'round')}.{sampled} "
    )
    if algorithm["name"] == "local_only":
        return sentence + f"Training is local only: nothing is exchanged. Seed {config['seed']}."
    threshold = algorithm["agreement_threshold"]
    abstains = f"and abstains under an agreement of {threshold:g}" if threshold > 0 else "and never abstains"
    return sentence + (
        f"All answer {_count(prompts['budget'], 'public prompt')} ({prompts['selection']}), of which the server keeps one "
        f"answer each by the {algorithm['rule'].replace('_', ' ')} rule as a pseudo-label {abstains}. Seed {config['seed']}."
    )


def headlines(run: Run) -> list[dict[str, str]]:
    """The numbers at the top of the page: label, value and a note each."""
    cost, nll, clients = totals(run), mean_by_round(run.metrics, "nll"), quality(run.metrics)
    change = clients["change_nll"].dropna()
    total = cost.uplink_bytes + cost.downlink_bytes
    if nll.empty:
        first = {"label": "Mean test NLL", "value": "not measured", "note": "nats a token"}
    elif len(nll) == 1:
        first = {"label": f"Mean test NLL, round {nll.index[0]}", "value": format_number(nll.iloc[0]), "note": "nats a token, measured"}
    else:
        start = "base" if nll.index[0] == 0 else f"round {nll.index[0]}"
        relative = nll.iloc[-1] / nll.iloc[0] - 1 if nll.iloc[0] else 0.0
        first = {
            "label": f"Mean test NLL, {start} → round {nll.index[-1]}",
            "value": f"{format_number(nll.iloc[0])} → {format_number(nll.iloc[-1])}",
            "note": f"{format_number(100 * relative, 1, signed=True)}%, nats a token, measured",
        }
    second = {"label": "Clients with a lower NLL", "value": "–", "note": "not measured"}
    if len(change) and run.num_rounds:
        worst, best = change.idxmax(), change.idxmin()
        spread = f"from {format_number(change[best], signed=True)} (client {best}) to {format_number(change[worst], signed=True)} (client {worst})"
        only = f"{format_number(change[best], signed=True)} nats a token"
        second |= {
            "value": f"{(change < 0).sum()} of {len(clients)}",
            "note": spread if len(change) > 1 else only,
        }
    return [
        first,
        second,
        {
            "label": "On the wire",
            "value": format_quantity(total, "B") if total else "nothing",
            "note": f"{format_quantity(cost.uplink_bytes, 'B')} up, {format_quantity(cost.downlink_bytes, 'B')} down, measured",
        },
        {
            "label": "Energy",
            "value": format_quantity(cost.joules, "J") if cost.energy_source != "unavailable" else "unavailable",
            "note": cost.energy_source if cost.energy_source != "unavailable" else "no counter and no estimate",
        },
        {
            "label": "Wall time",
            "value": format_seconds(cost.wall_seconds),
            "note": f"set-up {format_seconds(cost.setup_seconds)} of it, measured",
        },
    ]


def energy_note(placement: Mapping[str, Any]) -> str:
    """Which meters the run's machines had."""
    meters: Mapping[str, str] = placement.get("energy_meters", {})
    named = sorted({name for name in meters.values() if name})
    without = sum(not name for name in meters.values())
    parts = [f"metered by {', '.join(named)}"] if named else []
    if without:
        parts.append(f"{_count(without, 'machine')} without an energy counter, where joules are estimated")
    if named and not any("rapl" in name for name in named):
        parts.append("the CPU's own energy is not counted where GPUs alone are metered")
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
