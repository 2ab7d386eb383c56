"""Reads settings from YAML files and the command line, says what is wrong with them, and describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from semcons_ray.config.base import Settings, SomeSettings
from semcons_ray.config.documents import dump_yaml, parse_yaml, read_yaml
from semcons_ray.config.experiment import (
    DEFAULTS,
    ExperimentConfig,
    has_setting,
    is_chosen,
    setting_value,
    without_effect,
)
from semcons_ray.config.keys import describe_error, find_setting, merge_settings, place_of
from semcons_ray.config.sections import UNIONS, FederationConfig
from semcons_ray.errors import ConfigError
from semcons_ray.parts import STORED, PartName, part_names

Layer = str | Path | Mapping[str, Any] | ExperimentConfig
"""Settings from one place: a YAML file, nested settings, or all of an experiment, of which those count that were
given."""


def load_config(
    source: Source, overrides: dict[str, Any] | None = None, *, stored: bool = False
) -> ExperimentConfig:
    """Read settings, and lay nested `overrides` over them.

    Args:
        source: Where they are read from.
        overrides: Nested settings.
        stored: Whether the settings are of a run that is only looked at: they fitted together when it began, and the
            parts that they name need not be there any more.

    Raises:
        ConfigError: A file is missing or not YAML, or a key or value is refused; the line names the file and the key.
    """
    if isinstance(source, ExperimentConfig) and not overrides:
        return source
    layers = Layers.read(source, overrides)
    if stored:
        return _validated(layers.merged(), layers.where, {STORED: True})
    return validate_config(layers.merged(), where=layers.where)


def load_federation(source: str | Path | Mapping[str, Any]) -> FederationConfig:
    """Read a federation.

    Args:
        source: A YAML file of an experiment's settings, of which only the section `federation` counts; or the settings
            of that section.

    Raises:
        ConfigError: The file is missing, is not YAML or has no such section, or a key or value is refused.
    """
    if isinstance(source, Mapping):
        return validate_config({"federation": {**source}}, where="the federation given").federation
    values = Layers.read(source).merged()
    if "federation" not in values:
        raise ConfigError(f"{source} has no section federation; write federation: {{devices: ...}}")
    return validate_config({"federation": values["federation"]}, where=str(source)).federation


@dataclass(frozen=True)
class Layers:
    """Nested settings from several places, each laid over those before it.

    Attributes:
        parts: The name of each place, for messages, and its settings.
    """

    parts: tuple[tuple[str, dict[str, Any]], ...]

    @classmethod
    def read(cls, source: Source, overrides: dict[str, Any] | None = None) -> Layers:
        """Those of files and mappings, and over them those of the command line.

        Raises:
            ConfigError: See `read_yaml`; or the source is of a kind that settings cannot be read from.
        """
        if isinstance(source, Layers):
            parts = [*source.parts]
        else:
            several = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
            parts = [_layer(part) for part in several if part is not None]
        if overrides or not parts:
            parts.append(("command line", overrides or {}))
        return cls(tuple(parts))

    def merged(self) -> dict[str, Any]:
        """The settings as they are together."""
        values: dict[str, Any] = {}
        for _, over in self.parts:
            values = merge_settings(values, over)
        return values

    def where(self, place: Sequence[str | int]) -> str:
        """The name of the part from which the value at a place is taken; for an empty place, the names of all."""
        keys = [str(key) for key in takewhile(lambda key: isinstance(key, str), place)]  # not into a list
        holding = [name for name, values in self.parts if keys and has_setting(values, keys)]
        return holding[-1] if holding else ", ".join(name for name, _ in self.parts)


Source = Layer | Sequence[Layer] | Layers | None
"""Where settings are read from: one place or several, each laid over those before it; None: nowhere, so that everything
has its default."""


def _layer(part: object) -> tuple[str, dict[str, Any]]:
    """The name of a place that has settings, and these."""
    if isinstance(part, str | Path):
        return str(part), read_yaml(Path(part))
    if isinstance(part, ExperimentConfig):
        part = part.model_dump(mode="json", exclude_unset=True)
    if not isinstance(part, Mapping):
        raise ConfigError(f"settings are read from a path, a mapping or an ExperimentConfig, not from {part!r}")
    return "the settings given", dict(part)


def as_study(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a comparison or a sweep of an experiment that has these settings, and whose name it bears."""
    return {"experiment": values} | {key: values[key] for key in values.keys() & {"name"}}


Where = str | Callable[[Sequence[str | int]], str]
"""Where settings came from, for messages: a name, or a function that gives the name for the place of a value."""


def parse_setting(key: str, words: str) -> Any:
    """The value that `words` on the command line stand for: themselves if the setting is text, else read as YAML.

    Raises:
        ConfigError: The setting is not text, and the words are not YAML.
    """
    field = find_setting(key)
    kind = field.annotation if field else None
    kinds = set(get_args(kind)) if get_origin(kind) is UnionType else {kind}
    is_nothing = NoneType in kinds and words in ("", "~", "null")
    if all(map(_is_text, kinds - {NoneType})) and not is_nothing:
        return words
    try:
        return parse_yaml(words)
    except ValueError as error:
        raise ConfigError(f"--{key}: cannot read {words!r}") from error


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)))


def validate_config(values: dict[str, Any], *, where: Where, shared: dict[str, Any] | None = None) -> ExperimentConfig:
    """Check nested settings and fill in the defaults.

    Args:
        values: Settings by section.
        where: Where they came from, for the error line.
        shared: Those of `values` that several runs share. One that has no effect in this run is meant for the others,
            and is put back to its default here. Any other setting without effect is an error.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type, is out of range or has no effect.
    """
    return _settled(validate_shared(values, where=where, shared=shared))


def _settled(config: ExperimentConfig) -> ExperimentConfig:
    """The same settings, with the defaults of those that have no effect."""
    for key, _ in [*without_effect(config)]:
        if key.startswith("clients.overrides."):
            config = _with_setting(config, "clients.overrides", _without(config, key))
        else:
            config = _with_setting(config, key, setting_value(DEFAULTS, key))
    return config


def with_engine(config: ExperimentConfig, engine: Literal["transformers", "vllm"]) -> ExperimentConfig:
    """The settings with `generation.engine` resolved; those that have no effect then have their defaults.

    Workers have what an engine leaves of a GPU, unless it is said what they have.
    """
    resources = config.resources
    if engine == "vllm" and not is_chosen(config, "resources.gpus_per_worker"):
        left = round(resources.gpus_per_worker - resources.engine_gpus, 4)
        if left > 0:
            resources = resources.model_copy(update={"gpus_per_worker": left})
    generation = config.generation.model_copy(update={"engine": engine})
    return _settled(config.model_copy(update={"generation": generation, "resources": resources}))


def _with_setting(settings: SomeSettings, key: str, value: Any) -> SomeSettings:
    """A copy of settings in which one has another value, given by its dotted key."""
    first, _, rest = key.partition(".")
    return settings.model_copy(update={first: _with_setting(getattr(settings, first), rest, value) if rest else value})


def _without(config: ExperimentConfig, key: str) -> dict[int, Any]:
    """The overrides without one, by its dotted key."""
    *_, client, section, name = key.split(".")
    left = {
        number: {part: {**inner} for part, inner in own.items()} for number, own in config.clients.overrides.items()
    }
    del left[int(client)][section][name]
    return left


def validate_shared(values: dict[str, Any], *, where: Where, shared: dict[str, Any] | None = None) -> ExperimentConfig:
    """The same as `validate_config`, but shared settings without effect keep their values."""
    return _validated(values, where, {"shared": shared or {}})


def _validated(values: dict[str, Any], where: Where, context: dict[str, Any]) -> ExperimentConfig:
    try:
        return ExperimentConfig.model_validate(values, context=context)
    except ValidationError as error:
        raise refusal(error, where) from error


def refusal(error: ValidationError, where: Where) -> ConfigError:
    """All mistakes in one line, after the name of the place in which each was made."""
    told: dict[str, list[str]] = {}
    for item in error.errors():
        place = where if isinstance(where, str) else where(place_of(item))
        told.setdefault(place, []).append(describe_error(item))
    return ConfigError("; ".join(f"{place}: {'; '.join(words)}" for place, words in told.items()))


def dump_config(config: ExperimentConfig) -> str:
    """The config as YAML, with every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def describe_settings(*, as_yaml: bool = False) -> str:
    """Every setting with its default and its description, as a list of command-line options or as a YAML file."""
    lines: list[str] = []
    for name, field in ExperimentConfig.model_fields.items():
        _describe_field(lines, name, field, (), as_yaml)
    return "\n".join(lines)


def _describe_field(lines: list[str], name: str, field: FieldInfo, parents: tuple[str, ...], as_yaml: bool) -> None:
    default = field.get_default(call_default_factory=True)
    indent = "  " * len(parents)
    if isinstance(default, Settings):
        summary = (type(default).__doc__ or "").strip().splitlines()[0]
        lines += ["", f"{indent}# {summary}", f"{indent}{name}:"] if as_yaml else ["", f"  {summary}"]
        for key, inner in type(default).model_fields.items():
            _describe_field(lines, key, inner, (*parents, name), as_yaml)
        return
    text = dump_yaml(default, in_a_line=True).removesuffix("...\n").strip()
    own = [part for part in field.metadata if isinstance(part, PartName)] or part_names(field.annotation)
    allowed = [name for part in own for name in part.choices()] or _choices(field.annotation)
    choices = f"One of: {', '.join(allowed)}{', or module:object' if own else ''}." if allowed else ""
    help_text = " ".join(filter(None, [field.description, choices]))
    if as_yaml:
        lines += [f"{indent}# {help_text}"] if help_text else []
        lines.append(f"{indent}{name}: {text}")
    else:
        lines.append(f"  --{'.'.join((*parents, name))} [{text}]{'  ' + help_text if help_text else ''}")


def _choices(kind: Any) -> list[str]:
    """The texts that a setting takes, if it takes only certain ones, or none."""
    members = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in UNIONS else [kind]
    closed = all(get_origin(part) is Literal for part in members)
    choices = [choice for part in members if closed for choice in get_args(part)]
    return [str(one).lower() if isinstance(one, bool) else one for one in choices if isinstance(one, str | bool)]
