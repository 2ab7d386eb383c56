"""The parts of the documentation that are made from the code, as Markdown.

A page has a line `<!-- from the code: NAME -->` where such a part stands; see `MAKERS` for the names.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import msgspec
from pydantic.fields import FieldInfo

import semcons_ray
from semcons_ray.api.parts import rows as parts_listed
from semcons_ray.commands import cli
from semcons_ray.commands.init import PRESETS
from semcons_ray.config import ExperimentConfig, Settings, describe_settings, dump_yaml
from semcons_ray.endpoints.api_model import ApiOptions
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.parts import BUILT_IN, GROUPS, PROTOCOLS, Kind, plural
from semcons_ray.runs import run_folder
from semcons_ray.runs.run_folder import MetricsRow, RoundRow, columns_of

PLACE = re.compile(r"<!-- from the code: ([a-z_]+) -->")
"""Where a part made from the code stands in a page."""


def filled(page: str) -> str:
    """A page with its parts that are made from the code."""
    return PLACE.sub(lambda place: MAKERS[place[1]](), page)


# Settings


def settings() -> str:
    """Every setting, by section: what it takes, its default, and what it does."""
    schema = ExperimentConfig.model_json_schema()
    own, sections = [], []
    for name, field in ExperimentConfig.model_fields.items():
        if isinstance(_default(field), Settings):
            sections += _section(name, field, schema)
        else:
            own.append(_setting(name, field, schema["properties"][name]))
    return "\n".join([_heading("The experiment"), *own, *sections])


def _section(name: str, field: FieldInfo, schema: dict[str, Any]) -> Iterator[str]:
    kind = type(_default(field))
    yield _heading(f"`{name}`")
    yield f"{inspect.getdoc(kind)}\n"
    properties = schema["$defs"][kind.__name__]["properties"]
    for key, inner in kind.model_fields.items():
        if isinstance(_default(inner), Settings):
            yield from _section(f"{name}.{key}", inner, schema)
        else:
            yield _setting(f"{name}.{key}", inner, properties[key])


def _setting(key: str, field: FieldInfo, schema: dict[str, Any]) -> str:
    told = f"{_capital(values(schema))}. Default: `{_written(_default(field))}`"
    return f"```{{setting}} {key}\n{told}\n\n{field.description}\n```\n"


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _written(value: Any) -> str:
    return dump_yaml(value, in_a_line=True).removesuffix("...\n").strip()


def values(schema: dict[str, Any]) -> str:
    """What a JSON Schema lets a value be, in words."""
    *some, last = dict.fromkeys(_kinds(schema))
    return f"{', '.join(some)} or {last}" if some else last


def _kinds(schema: dict[str, Any]) -> list[str]:
    """The kinds of values, or the single values, that a JSON Schema allows."""
    if "anyOf" in schema:
        return [kind for one in schema["anyOf"] for kind in _kinds(one)]
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return [f"`{str(one).lower() if isinstance(one, bool) else one}`" for one in choices]
    if schema.get("type") in ("integer", "number"):
        return [_number(schema)]
    if schema.get("type") == "array":
        return [f"a list of: {values(schema['items'])}" if schema.get("items") else "a list"]
    if "pattern" in schema:
        return ["`module:object`"]
    if schema.get("type") == "boolean":
        return ["`true`", "`false`"]
    if schema.get("format") == "date":
        return ["a date"]
    return [{"null": "`null`", "object": "a mapping"}.get(schema.get("type", ""), "text")]


def _number(schema: dict[str, Any]) -> str:
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    return " ".join([kind, *(f"{words} {schema[key]:g}" for key, words in bounds.items() if key in schema)])


def openai() -> str:
    """Options of clients behind an API."""
    properties = ApiOptions.model_json_schema()["properties"]
    rows = [
        (f"`{name}`", f"{values(properties[name])}; `{_written(_default(field))}`", field.description or "")
        for name, field in ApiOptions.model_fields.items()
    ]
    return _table(("option", "what it takes; default", "what it does"), rows)


# The command


def commands() -> str:
    """Every command: its usage, arguments and notes."""
    parser = cli.build_parser() if hasattr(cli, "build_parser") else cli._parser()
    (listed,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return "\n".join(part for name, sub in listed.choices.items() for part in _command(name, sub))


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield _heading(f"semcons {name}")
    yield f"{parser.description}\n"
    yield f"```text\n{_one_line(parser.format_usage().removeprefix('usage: '))}\n```\n"
    rows = []
    for action in parser._actions:
        if action.help and action.help != argparse.SUPPRESS and action.dest != "help":
            names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
            rows.append((names, _capital(action.help % {**vars(action), "prog": parser.prog})))
    if rows:
        yield _table(("argument", "what it is"), rows)
    notes, listing, _ = (parser.epilog or "").partition(describe_settings())
    if listing:
        yield "Every [setting](settings.md) can be given as `--its.key value`, over what the files say.\n"
    elif notes:
        yield f"```text\n{notes.strip()}\n```\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# Parts


def parts() -> str:
    """The built-in parts of each kind, with their options, and the Protocol that others are to fit."""
    return "\n".join(part for kind in BUILT_IN for part in _parts(kind))


def _parts(kind: Kind) -> Iterator[str]:
    yield _heading(_capital(plural(kind)))
    yield (
        f"Protocol: {{py:obj}}`{PROTOCOLS[kind].replace(':', '.')}`. Entry points of packages: `{GROUPS[kind]}`.\n"
    )
    built_in = [row for row in parts_listed([kind]) if row[1] in BUILT_IN[kind]]
    rows = [
        (f"`{name}`", CONTROLS.get(name, summary), f"`{options}`" if options and name not in CONTROLS else "")
        for _, name, _, _, options, summary in built_in
    ]
    yield _table(("name", "what it is", "options"), rows) if rows else "None is built in.\n"


CONTROLS = {
    "reference": "A control: labels are the data's own answers.",
    "own_answer": "A control: each client learns its own answers, which is self-training; nothing is exchanged.",
}
"""Rules that are told by the algorithm and not by a function of their own."""


def protocols() -> str:
    """The Protocols that parts are to fit."""
    told = "   :members:\n   :inherited-members: Protocol\n   :special-members: __call__\n"
    blocks = [f".. autoclass:: {path.replace(':', '.')}\n{told}" for path in PROTOCOLS.values()]
    return "\n".join(["```{eval-rst}", *blocks, "```"])


def api() -> str:
    """Every public name: functions, then classes, then errors."""
    named = [(name, getattr(semcons_ray, name)) for name in semcons_ray.__all__ if name != "__version__"]
    classes = [(name, each) for name, each in named if inspect.isclass(each)]
    errors = {name for name, each in classes if issubclass(each, Exception)}
    kinds = {
        "Functions": ("autofunction", [name for name, each in named if not inspect.isclass(each)]),
        "Classes": ("autoclass", [name for name, _ in classes if name not in errors]),
        "Errors": ("autoexception", sorted(errors)),
    }
    return "\n".join(part for title, (directive, names) in kinds.items() for part in _api(title, directive, names))


def _api(title: str, directive: str, names: list[str]) -> Iterator[str]:
    yield _heading(title)
    members = "   :members:\n" if directive == "autoclass" else ""
    yield "\n".join(["```{eval-rst}", *(f".. {directive}:: semcons_ray.{name}\n{members}" for name in names), "```"])


def presets() -> str:
    """The presets of `semcons init`."""
    firsts = [(name, path.read_text(encoding="utf-8").partition("\n")[0]) for name, path in PRESETS.items()]
    return _table(("preset", "for"), [(f"`{name}`", first.removeprefix("# ")) for name, first in firsts])


# The run folder


def files() -> str:
    """What is in a run's folder."""
    doc = inspect.getdoc(run_folder) or ""
    listed = re.findall(r"^    (\S.*?)  +(\S.*)$", doc, re.M)
    return _table(("file", "what it holds"), [(_names(names), _capital(what)) for names, what in listed])


def _names(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def columns(row: type[msgspec.Struct]) -> str:
    """The columns of a table whose rows are of a class."""
    told = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(row) or "", re.M))
    hints = get_type_hints(row)
    words = {int: "whole number", float: "number", str: "text"}
    rows = [(f"`{name}`", words.get(hints[name], "text"), _one_line(told.get(name, ""))) for name in columns_of(row)]
    return _table(("column", "type", "what it is"), rows)


# Markdown


def _heading(text: str) -> str:
    return f"\n## {text}\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _sentence(text: str) -> str:
    """The first sentence of a text."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", _one_line(text.partition("\n\n")[0]), maxsplit=1)[0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


MAKERS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "openai": openai,
    "commands": commands,
    "parts": parts,
    "protocols": protocols,
    "api": api,
    "presets": presets,
    "files": files,
    "metrics_columns": lambda: columns(MetricsRow),
    "rounds_columns": lambda: columns(RoundRow),
    "ledger_columns": lambda: columns(LedgerRow),
}
"""What makes each part, by the name that pages use."""
