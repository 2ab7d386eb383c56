"""YAML 1.2, each key once: how settings are written down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from semcons_ray.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested settings in a YAML file; an empty file gives an empty dict.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds something other than settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_reason(error)}") from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not settings (key: value)")
    return values or {}


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2. In version 1.1, which PyYAML follows, 1e-3 is text, no and on are truth values, 010 is eight and
    1:30 is ninety. A key that is there twice, which no version allows, is an error; PyYAML would drop the first."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """All of it at once: then PyYAML refuses what holds itself."""
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


class _Dumper(yaml.SafeDumper):
    """Puts a text into quotes if version 1.1 or 1.2 would read it as anything else."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: It is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises many kinds where a tag, such as !!bool, does not fit what follows it
        raise ValueError(str(error)) from error


def dump_yaml(values: Any, *, in_a_line: bool = False) -> str:
    """YAML that `parse_yaml` reads back; keys keep their order."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=in_a_line,
        width=float("inf") if in_a_line else 80,
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
