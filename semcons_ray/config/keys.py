"""Settings by dotted key and as nested mappings: what they stand for, laid over one another, and what was meant by an
unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from semcons_ray.config.base import Settings
from semcons_ray.parts import SECRET

OPTIONS = dict[str, Any]
"""The type of a setting with options of a part."""


class Within(dict[str, Any]):
    """Options that are laid over those that are there, as a dotted key gives them, and do not replace all of them."""


OVERRIDES = "overrides"
"""The setting of `clients` whose value is nested settings again, by client id."""


def _experiment() -> type[Settings]:
    from semcons_ray.config.experiment import ExperimentConfig  # whose sections need this module

    return ExperimentConfig


def find_setting(key: str) -> FieldInfo | None:
    """The field of a dotted key, which may name a setting or a section; None if there is no such key."""
    fields: dict[str, FieldInfo] = _experiment().model_fields
    *sections, last = key.split(".")
    for section in sections:
        kind = fields[section].annotation if section in fields else None
        if not (isinstance(kind, type) and issubclass(kind, Settings)):
            return None
        fields = kind.model_fields
    return fields.get(last)


def is_option(key: str) -> bool:
    """Whether a dotted key leads to an option of a part, as algorithm.rule_options.temperature."""
    field = find_setting(key.rpartition(".")[0])
    return field is not None and field.annotation == OPTIONS


def typed(key: str, value: Any) -> Any:
    """A value converted as the setting `key` would: text to a number, a path made absolute; for a section, all values.

    A value that the setting refuses is returned unchanged; `validate_config` reports it later.
    """
    field = find_setting(key)
    if field is None:
        return value
    if isinstance(field.default, Settings):
        known = isinstance(value, dict)
        return {name: typed(f"{key}.{name}", inner) for name, inner in value.items()} if known else value
    kind: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(kind).dump_python(TypeAdapter(kind).validate_python(value), mode="json")
    except ValidationError:
        return value


def changed_settings(config: Settings) -> dict[str, Any]:
    """Nested settings of an experiment, or of a section, that differ from their defaults, as plain values."""
    plain, changed = config.model_dump(mode="json"), {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            if inner := changed_settings(value):
                changed[name] = inner
        elif value != field.get_default(call_default_factory=True):
            changed[name] = plain[name]
    return changed


def merge_settings(base: dict[str, Any], over: dict[str, Any], within: type[Settings] | None = None) -> dict[str, Any]:
    """A copy of nested settings in which those of `over` replace those of `base`.

    Sections are merged, those of single clients as well, and one without settings changes nothing. A mapping that is
    the value of one setting, as of `clients.mix`, is replaced as a whole, as it could not be emptied otherwise; but see
    `Within`.

    Args:
        base: Settings.
        over: Settings that are laid over them.
        within: The section that they are of; None: an experiment.
    """
    result = dict(base)
    for key, value in over.items():
        section, old = _section(within, key), result.get(key)
        if section and isinstance(old, dict) and isinstance(value, dict | None):
            result[key] = merge_settings(old, value or {}, section)
        elif key == OVERRIDES and isinstance(old, dict) and isinstance(value, dict):
            result[key] = _merge_overrides(old, value)
        elif isinstance(value, Within) and isinstance(old, dict):
            result[key] = type(old)({**old, **value})
        else:
            result[key] = value
    return result


def _merge_overrides(base: dict[Any, Any], over: dict[Any, Any]) -> dict[str, Any]:
    """Settings of single clients, whose ids are numbers in YAML and texts in a key of the command line."""
    result = {str(client): own or {} for client, own in base.items()}
    for client, own in over.items():
        result[str(client)] = merge_settings(result.get(str(client), {}), own) if isinstance(own, dict) else own
    return result


def without_settings(
    base: dict[str, Any], others: dict[str, Any], within: type[Settings] | None = None
) -> dict[str, Any]:
    """A copy of nested settings without those that `others` has as well; see `merge_settings` for `within`."""
    result = {}
    for key, value in base.items():
        section, other = _section(within, key), others.get(key)
        if key not in others:
            result[key] = value
        elif section and isinstance(value, dict) and isinstance(other, dict):
            result[key] = without_settings(value, other, section)
        elif isinstance(other, Within) and isinstance(value, dict):
            result[key] = {name: inner for name, inner in value.items() if name not in other}
    return result


def _section(within: type[Settings] | None, key: str) -> type[Settings] | None:
    """The class of the section `key` of an experiment, or of the section `within`; None if it is no section."""
    field = (within or _experiment()).model_fields.get(key)
    return type(field.default) if field and isinstance(field.default, Settings) else None


def describe_error(item: Any) -> str:
    """A few words on one entry of a pydantic ValidationError's `errors()`, naming the key."""
    key = ".".join(map(str, place_of(item)))
    if item["type"] == "extra_forbidden":
        return f"unknown setting '{key}'{_suggestion(key, item['input'])}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == SECRET:
        return f"{key}: {message}"
    return f"{key}: {message} (got {item['input']!r})" if key else message


def place_of(item: Any) -> tuple[str | int, ...]:
    """The keys that lead to the value of which an entry of `errors()` tells."""
    return tuple(part for part in item["loc"] if "[" not in str(part))  # not the branches of a union


_ELSEWHERE = {
    "alpha": "data.dirichlet_alpha",
    "beta": "data.dirichlet_alpha",
    "dataset": "data.source",
    "device_map": "resources.device",
    "fraction_fit": "clients.participation",
    "gpus": "resources.gpus_per_worker",
    "local_epochs": "training.local_epochs",
    "lora_alpha": "model.lora.alpha",
    "loggers": "tracking.report_to",
    "lora_dropout": "model.lora.dropout",
    "lr": "training.learning_rate",
    "max_seq_length": "model.max_length",
    "max_steps": "training.local_steps",
    "model_name_or_path": "model.name",
    "num_gpus": "resources.gpus_per_worker",
    "num_prompts": "prompts.budget",
    "num_server_rounds": "num_rounds",
    "num_supernodes": "clients.num_clients",
    "num_train_epochs": "training.local_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "sample_packing": "training.packing",
    "warmup_steps": "training.warmup_ratio",
    "per_device_eval_batch_size": "generation.batch_size",
    "r": "model.lora.rank",
    "rounds": "num_rounds",
    "num_return_sequences": "generation.num_samples",
    "strategy": "algorithm.name",
    "test_size": "data.client_test_fraction",
    "stop_strings": "generation.stop",
    "torch_dtype": "model.dtype",
    "train_batch_size": "training.batch_size",
}
"""Names that other libraries have for these settings."""


def setting_keys(model: type[Settings] | None = None, above: str = "") -> Iterator[str]:
    """Dotted keys of all settings below a section; by default of all there are."""
    for name, field in (model or _experiment()).model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Settings):
            yield from setting_keys(type(default), f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _suggestion(key: str, value: Any) -> str:
    """A hint at the key that was probably meant by an unknown one; empty if there is no guess."""
    while isinstance(value, dict) and len(value) == 1:  # of a section that is unknown, the setting in it says more
        [(name, value)] = value.items()
        key = f"{key}.{name}"
    keys = [*setting_keys()]
    *_, last = key.split(".")
    by_name: dict[str, list[str]] = {}
    for known in keys:
        by_name.setdefault(known.rsplit(".", 1)[-1], []).append(known)
    meant = (
        by_name.get(last)
        or ([_ELSEWHERE[last]] if last in _ELSEWHERE else [])
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
        or [known for name in difflib.get_close_matches(last, by_name, n=1, cutoff=0.75) for known in by_name[name]]
        or difflib.get_close_matches(key, keys, n=1)
    )
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _as_section(values: Any) -> Any:
    if values is None:
        return {}
    return {key: typed(str(key), value) for key, value in values.items()} if isinstance(values, dict) else values


Section = Annotated[dict[str, Any], BeforeValidator(_as_section)]
"""Nested settings that are laid over others and checked later. None is an empty section. Values are converted to the
types of their settings (see `typed`)."""
