"""Tables of devices, links and regions by name, and profiles of one's own with the same fields."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from semcons_ray.config.documents import read_yaml
from semcons_ray.errors import ConfigError
from semcons_ray.modeling.shapes import SHAPES
from semcons_ray.timeline.devices import Device, Model, Rates
from semcons_ray.timeline.links import Link

Checked = TypeVar("Checked", Device, Link, Rates)


def device(profile: str | Mapping[str, Any], setting: str = "federation.devices") -> Device:
    """A device by its name in the table, or one's own.

    Args:
        profile: A name, or the fields of `Device`. Those of `Rates` may stand for peak, bandwidth and utilizations.
        setting: The setting that has it, for messages.

    Raises:
        ConfigError: There is no such name, or a field is unknown, missing, out of range, or there twice.
    """
    fields = _fields(profile, "device", setting)
    if measured := {field: fields.pop(field) for field in _names(Rates) if field in fields}:
        roofline = _checked(Rates, measured, setting).roofline()
        if twice := [field for field in roofline if field in fields]:
            raise ConfigError(f"{setting}: {', '.join(twice)} follows from the measured rates; leave one of them out")
        fields |= roofline
    return _checked(Device, fields, setting)


def link(profile: str | Mapping[str, Any], setting: str = "federation.links") -> Link:
    """A link by its name in the table, or one's own by the fields of `Link`; see `device` for the rest."""
    return _checked(Link, _fields(profile, "link", setting), setting)


def region(name: str, setting: str = "federation.region") -> float:
    """Grams of CO2 that a kilowatt-hour of electricity causes in a country, a state of one, or the `world`.

    Raises:
        ConfigError: There is no such name.
    """
    return float(_named(name, table("regions"), "region", setting)["grams_co2_per_kwh"])


def model(name: str, setting: str = "--model") -> Model:
    """A model by the name of its shape.

    Raises:
        ConfigError: There is no such name.
    """
    return Model.of(_named(name, SHAPES, "model", setting))


@cache
def table(kind: str) -> dict[str, dict[str, Any]]:
    """All rows of `devices`, `links` or `regions`, by name."""
    return read_yaml(Path(__file__).with_name("profiles") / f"{kind}.yaml")


def _fields(profile: str | Mapping[str, Any], kind: str, setting: str) -> dict[str, Any]:
    if isinstance(profile, str):
        return {"name": profile, **_named(profile, table(f"{kind}s"), kind, setting)}
    return {str(field): value for field, value in profile.items()}


def _checked(kind: type[Checked], fields: Mapping[str, Any], setting: str) -> Checked:
    known = _names(kind)
    for field in fields:
        if field not in known:
            raise ConfigError(f"{setting}: there is no {field}{_hint(field, known)}; there are {', '.join(known)}")
    try:
        return kind(**fields)
    except ValidationError as error:
        told = error.errors()[0]
        got = "" if told["msg"] == "Field required" else f" (got {told['input']!r})"
        raise ConfigError(f"{setting}: {'.'.join(map(str, told['loc']))}: {told['msg']}{got}") from None


def _names(kind: type[Checked]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _named(name: str, rows: Mapping[str, Any], what: str, setting: str) -> Any:
    if name not in rows:
        raise ConfigError(f"{setting}: there is no {what} {name}{_hint(name, rows)}; there are {', '.join(rows)}")
    return rows[name]


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
