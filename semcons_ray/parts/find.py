"""Finds a part by its name, checks that it fits its Protocol, and makes it with its options."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from semcons_ray.errors import ConfigError, first_line
from semcons_ray.parts.table import BUILT_IN, GROUPS, PROTOCOLS, Kind

SECRET = "secret"
"""Kind of a pydantic error whose value may be a key or a password, and is never shown."""

NOTHING: Mapping[str, Any] = {}


def names(kind: Kind) -> dict[str, str]:
    """All parts of a kind that have a name, as `module:object` by name: the built-in ones, and those of packages."""
    return {**_of_packages(kind), **BUILT_IN[kind]}


@functools.cache
def _of_packages(kind: Kind) -> dict[str, str]:
    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUPS[kind])}


@functools.cache
def resolve(kind: Kind, name: str) -> Any:
    """The class, function or other object that a name stands for.

    Args:
        kind: What it is for.
        name: A built-in name, one of an installed package, or `module:object`. A module is looked for in the working
            folder, too.

    Raises:
        ConfigError: There is no such part, it cannot be imported, or it does not fit its Protocol; the message says
            what is missing.
    """
    path = BUILT_IN[kind].get(name) or _of_packages(kind).get(name) or name
    if ":" not in path:
        known = names(kind)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"there is no {kind} {name}{hint}; there are {', '.join(known)}, and any module:object")
    part = _load(path)
    if missing := [*_missing(kind, part)]:
        raise ConfigError(f"{name} does not do as {_article(kind)}: {'; '.join(missing)}")
    return part


def build(
    kind: Kind,
    name: str,
    options: Mapping[str, Any] = NOTHING,
    *,
    setting: str,
    offered: Mapping[str, Any] = NOTHING,
) -> Any:
    """Make a part: an object of its class, or its function with the options filled in.

    Args:
        kind: What it is for.
        name: See `resolve`.
        options: Values for parameters of the class or function, converted to their annotated types; if a class has a
            parameter `options` that is a model of pydantic's, values for its fields.
        setting: The setting that has the options, for messages.
        offered: Further values for a class, of which it gets those that it has parameters for.

    Raises:
        ConfigError: See `resolve`; or it has no such option, lacks one, or refuses a value.
    """
    part = resolve(kind, name)
    if not callable(part) or (not inspect.isclass(part) and not inspect.isroutine(part)):
        if options:
            raise ConfigError(f"{setting}: {name} is an object that is made already, and takes no options")
        return part
    parameters = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settable = {key for key in _optional(kind, part) if key not in offered}
    if unknown := [key for key in options if key not in settable and not takes_any]:
        has = f"it has {', '.join(sorted(settable))}" if settable else "it has none"
        raise ConfigError(f"{setting}: {name} has no option {', '.join(map(str, unknown))}; {has}")
    if gathered := _gathered(part):
        values: dict[str, Any] = {"options": _validated(gathered, options, setting)}
    else:
        values = {key: _typed(part, key, value, f"{setting}.{key}") for key, value in options.items()}
    if not inspect.isclass(part):
        return functools.update_wrapper(functools.partial(part, **values), part) if values else part
    values = {key: value for key, value in offered.items() if key in parameters or takes_any} | values
    needed = [key for key, parameter in parameters.items() if _is_needed(parameter) and key not in values]
    if needed:
        raise ConfigError(f"{setting}: {name} needs {', '.join(needed)}")
    try:
        made = part(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{setting}: {name} refuses its options: {first_line(error)}") from error
    if lacks := [key for key in _attributes(_load(PROTOCOLS[kind])) if not hasattr(made, key)]:
        raise ConfigError(f"{name} does not do as {_article(kind)}: it has no {', '.join(lacks)}")
    return made


def options_of(kind: Kind, name: str, offered: Mapping[str, Any] = NOTHING) -> dict[str, inspect.Parameter]:
    """The options that a part takes, by name, without what it is offered; see `build`."""
    found = _optional(kind, resolve(kind, name))
    return {key: parameter for key, parameter in found.items() if key not in offered}


def _optional(kind: Kind, part: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a class, or those of a function that its Protocol does not fill."""
    if gathered := _gathered(part):
        return dict(inspect.signature(gathered).parameters)
    parameters = dict(inspect.signature(part).parameters)
    if not inspect.isclass(part):
        for taken in [*parameters][: len(_names(_load(PROTOCOLS[kind]).__call__)) - 1]:
            del parameters[taken]
    spread = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {key: parameter for key, parameter in parameters.items() if parameter.kind not in spread}


def _gathered(part: Any) -> type[BaseModel] | None:
    """The class of a part's parameter `options`, where that is a model of pydantic's: its fields are the options."""
    kind = _hints(part).get("options") if inspect.isclass(part) else None
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def _validated(kind: type[BaseModel], options: Mapping[str, Any], setting: str) -> BaseModel:
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        told = error.errors()[0]
        key = ".".join(map(str, (setting, *told["loc"])))
        got = "" if told["type"] in (SECRET, "missing", "value_error") else f" (got {told['input']!r})"
        raise ConfigError(f"{key}: {told['msg'].removeprefix('Value error, ')}{got}") from None


def _is_needed(parameter: inspect.Parameter) -> bool:
    by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return by_name and parameter.default is parameter.empty


def _typed(part: Any, key: str, value: Any, setting: str) -> Any:
    """A value converted to the type with which the part's parameter is annotated, if it is and the type is known."""
    hints = _hints(part)
    if key not in hints:
        return value
    try:
        adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type that brings settings of its own
        adapter = TypeAdapter(hints[key])
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        told = error.errors()[0]
        raise ConfigError(f"{setting}: {told['msg']} (got {told['input']!r})") from error


def _hints(part: Any) -> dict[str, Any]:
    """Types of a part's parameters; none if one has a name that only type checkers see."""
    try:
        return typing.get_type_hints(part.__init__ if inspect.isclass(part) else part, include_extras=True)
    except NameError:
        return {}


def _load(path: str) -> Any:
    module_name, _, attributes = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as an installed command is not started with it
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module of anybody's may raise anything
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{path}: cannot import {module_name}: {said}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            public = [name for name in vars(found) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, public, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: {getattr(found, '__name__', found)} has no {attribute}{hint}")
        found = getattr(found, attribute)
    return found


def _missing(kind: Kind, part: Any) -> Iterator[str]:
    """What a part lacks of its Protocol's methods, in words."""
    if not callable(part):
        yield f"it is a {type(part).__name__}, neither a class nor a function"
        return
    for name, wanted in _methods(_load(PROTOCOLS[kind])).items():
        has = _method(part, name)
        if not callable(has):
            yield f"it has no {name}"
        elif not _takes(has, wanted, is_method=has is not part):
            yield f"{'it' if has is part else name} does not take ({', '.join(_names(wanted)[1:])})"


def _methods(protocol: type) -> dict[str, Any]:
    """Methods of a Protocol, those of the Protocols that it extends as well."""
    found: dict[str, Any] = {}
    for base in reversed(protocol.__mro__):
        if getattr(base, "_is_protocol", False):
            public = {name: value for name, value in vars(base).items() if name == "__call__" or name[0] != "_"}
            found |= {name: value for name, value in public.items() if inspect.isfunction(value)}
    return found


def _attributes(protocol: type) -> list[str]:
    """Properties of a Protocol, which an object may also set when it is made."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    return [name for base in bases for name, value in vars(base).items() if isinstance(value, property)]


def _method(part: Any, name: str) -> Any:
    """A method as a function that takes `self`; of a function only itself, as `__call__`."""
    if inspect.isroutine(part):
        return part if name == "__call__" else None
    kind = part if inspect.isclass(part) else type(part)
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _takes(has: Any, wanted: Callable[..., Any], *, is_method: bool) -> bool:
    """Whether a method, or a function in the place of one, can be called as that of a Protocol is."""
    by_name = [each.name for each in inspect.signature(wanted).parameters.values() if each.kind is each.KEYWORD_ONLY]
    signature = inspect.signature(has)
    bind = signature.bind if is_method else signature.bind_partial  # what is left of a function are its options
    has_self = is_method and not isinstance(has, staticmethod)
    try:
        bind(*_names(wanted)[0 if has_self else 1 :], **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


def _names(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that are given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def _article(kind: Kind) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
