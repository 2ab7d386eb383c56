"""Lists the parts that settings can name: those that are built in, and those of installed packages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from semcons_ray.errors import ConfigError
from semcons_ray.parts import BUILT_IN, GROUPS, PROTOCOLS, Kind, options_of, resolve
from semcons_ray.parts.find import of_packages, origin

__all__ = ["Kind", "describe_groups", "render_parts", "rows"]


def render_parts(kinds: list[Kind]) -> str:
    """A table with a row for each part, as wide as the terminal."""
    from semcons_ray.reporting.terminal import whole_table  # which imports pandas, and help needs none

    return whole_table(("kind", "name", "of", "object", "options", "what it is"), rows(kinds), ("kind", "of"), 200)


def describe_groups() -> str:
    """What a part of each kind is to have, and the group of entry points by which a package names its parts."""
    return "\n".join(f"  {kind:14}{PROTOCOLS[kind]:52}{group}" for kind, group in GROUPS.items())


def rows(kinds: list[Kind]) -> Iterator[tuple[str, ...]]:
    """For each part: kind, name, where it is from, `module:object`, options with their defaults, and what it is."""
    for kind in kinds:
        for name, path in BUILT_IN[kind].items():
            yield (kind, name, "semcons_ray", path, *_described(kind, name))
        for name, points in sorted(of_packages(kind).items()):
            for point in points:
                yield (kind, name, origin(point), point.value, *_described(kind, name))


def _described(kind: Kind, name: str) -> tuple[str, str]:
    """The options of a part and the first sentence of its docstring; in its place, what is wrong with it."""
    try:
        part, options = resolve(kind, name), options_of(kind, name)
    except (ConfigError, ImportError) as error:
        return "", f"cannot be used: {error}"
    said = inspect.getdoc(part) if inspect.isclass(part) or inspect.isroutine(part) else getattr(part, "label", "")
    summary = " ".join((said or "").partition("\n\n")[0].split())
    return ", ".join(map(_option, options.values())), re.split(r"(?<=\.) (?=[A-Z])", summary, maxsplit=1)[0]


def _option(parameter: inspect.Parameter) -> str:
    default: Any = parameter.default
    return parameter.name if default is parameter.empty else f"{parameter.name}={default!r}"
