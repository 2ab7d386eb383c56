"""Lists what a federation can name: devices, links, regions and models."""

from __future__ import annotations

from collections.abc import Callable

from semcons_ray.metering.units import format_quantity
from semcons_ray.modeling.shapes import SHAPES
from semcons_ray.timeline import profiles

Listed = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Heading and rows of a table."""


def render_profiles(kind: str) -> str:
    """A table with a row for each profile of a kind of `TABLES`, as wide as the terminal."""
    from semcons_ray.reporting.terminal import whole_table  # which imports pandas

    headings, rows = TABLES[kind]()
    return whole_table(headings, rows, ("name",), 160)


def devices() -> Listed:
    """Heading and rows of the table of devices. Speeds are those that they reach, of all that work as one."""
    rows: list[tuple[str, ...]] = []
    for name in profiles.table("devices"):
        one = profiles.device(name)
        speed = (format_quantity(one.flops, "FLOP/s"), format_quantity(one.bytes_per_second, "B/s"))
        watts = f"{one.num * one.idle_watts:g} / {one.num * one.busy_watts:g} W"
        rows.append((name, one.description, f"{one.num * one.memory_gb:g} GB", *speed, watts, one.source))
    return ("name", "what it is", "memory", "trains at", "reads at", "idle / busy", "source"), rows


def links() -> Listed:
    """Heading and rows of the table of links."""
    rows: list[tuple[str, ...]] = []
    for name in profiles.table("links"):
        one = profiles.link(name)
        rates = (f"{one.up_mbit:g} / {one.down_mbit:g} Mbit/s", f"{one.latency_ms:g} ms", f"{one.loss:.3g}")
        joules = f"{one.joules_per_megabyte_up:g} / {one.joules_per_megabyte_down:g} J/MB"
        rows.append((name, one.description, *rates, joules, one.source))
    return ("name", "what it is", "up / down", "latency", "loss", "energy up / down", "source"), rows


def regions() -> Listed:
    """Heading and rows of the table of regions."""
    found = profiles.table("regions").items()
    rows: list[tuple[str, ...]] = [(name, f"{row['grams_co2_per_kwh']:g}", str(row["year"])) for name, row in found]
    return ("name", "g CO2 a kWh", "year"), rows


def models() -> Listed:
    """Heading and rows of the table of models."""
    sizes = {name: profiles.model(name) for name in SHAPES}
    rows: list[tuple[str, ...]] = [
        (name, f"{one.parameters:,}", format_quantity(one.weight_bytes, "B")) for name, one in sizes.items()
    ]
    return ("name", "parameters", "weights in 16 bits"), rows


TABLES: dict[str, Callable[[], Listed]] = {
    "devices": devices,
    "links": links,
    "regions": regions,
    "models": models,
}
"""Heading and rows of what can be listed, by its name."""
