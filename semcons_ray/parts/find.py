"""Finds a part by its name, checks that it fits its Protocol, and makes it with its options."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from semcons_ray.errors import ConfigError, SemconsError, first_line
from semcons_ray.parts.table import BUILT_IN, GROUPS, OFFERED, PROTOCOLS, Kind, plural

SECRET = "secret"
"""Kind of a pydantic error whose value may be a key or a password, and is never shown."""

NOTHING: Mapping[str, Any] = {}

OURS = frozenset({*PROTOCOLS.values(), *(path for known in BUILT_IN.values() for path in known.values())})

PATH = r"\w+(\.\w+)*:\w+(\.\w+)*"
"""What `module:object` looks like."""


def names(kind: Kind) -> dict[str, str]:
    """All parts of a kind that have a name, as `module:object` by name: the built-in ones, and those of packages."""
    return {name: points[0].value for name, points in of_packages(kind).items()} | BUILT_IN[kind]


def path_of(kind: Kind, name: str) -> str:
    """The `module:object` that a name stands for, which may be one itself.

    Raises:
        ConfigError: There is no such name, or it stands for several.
    """
    known = BUILT_IN[kind]
    points = of_packages(kind).get(name, [])
    if len(points) + (name in known) > 1:
        owners = [*(["built in"] if name in known else []), *sorted(f"of package {origin(point)}" for point in points)]
        several = f"there are several {plural(kind)} {name}, {' and '.join(owners)}"
        raise ConfigError(f"{several}; say which by module:object")
    path = points[0].value if points else known.get(name, name)
    if not re.fullmatch(PATH, path):
        known = names(kind)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        listed = f"there are {', '.join(known)}, and any module:object" if known else "give one as module:object"
        raise ConfigError(f"there is no {kind} {name}{hint}; {listed}")
    return path


def origin(point: EntryPoint) -> str:
    """The package that an entry point is of."""
    return point.dist.name if point.dist else "?"


@functools.cache
def of_packages(kind: Kind) -> dict[str, list[EntryPoint]]:
    """Entry points of installed packages by the names that they give to parts of a kind."""
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUPS[kind]):
        found.setdefault(point.name, []).append(point)
    return found


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
    part = _load(path_of(kind, name))
    if missing := [*_missing(kind, part)]:
        raise ConfigError(f"{name} does not do as {_article(kind)}: {'; '.join(missing)}")
    return part


def check_options(kind: Kind, name: str, options: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The options of a part, converted to the types with which its parameters are annotated.

    Args:
        kind: What it is for.
        name: See `resolve`.
        options: Values for parameters of the class or function; if a class has a parameter `options` that is a model of
            pydantic's, values for its fields.
        setting: The setting that has the options, for messages.

    Raises:
        ConfigError: See `resolve`; or it has no such option, lacks one, or one has the wrong type.
    """
    part = resolve(kind, name)
    if not _is_made(part):
        if options:
            raise ConfigError(f"{setting}: {name} is an object that is made already, and takes no options")
        return {}
    takes = _Parameters.of(kind, part)
    if gathered := takes.gathered():
        return {"options": _validated(gathered, name, options, setting)}
    settable = {key: parameter for key, parameter in takes.known.items() if key not in OFFERED[kind]}
    if unknown := [str(key) for key in options if key not in settable and (key in takes.known or not takes.any)]:
        has = f"it has {', '.join(sorted(settable))}" if settable else "it has none"
        raise ConfigError(f"{setting}: {name} has no option {', '.join(unknown)}; {has}")
    if needed := [key for key, one in settable.items() if one.is_needed and key not in options]:
        raise ConfigError(f"{setting}: {name} needs {', '.join(needed)}")
    return {
        key: settable[key].converted(value, f"{setting}.{key}") if key in settable else value
        for key, value in options.items()
    }


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
        options: See `check_options`.
        setting: See `check_options`.
        offered: Values by the names in `OFFERED`, of which a class gets those that it has parameters for.

    Raises:
        ConfigError: See `check_options`; or its class refuses the options.
    """
    part, values = resolve(kind, name), check_options(kind, name, options, setting)
    if not _is_made(part):
        return part
    if not inspect.isclass(part):
        return functools.update_wrapper(functools.partial(part, **values), part) if values else part
    takes = _Parameters.of(kind, part)
    given = {key: value for key, value in offered.items() if key in takes.known or takes.any}
    try:
        made = part(**given, **values)
    except SemconsError:
        raise
    except Exception as error:  # anybody's class may raise anything
        raise ConfigError(f"{setting}: {name} refuses its options: {_reason(error)}") from error
    if lacks := [key for key in _attributes(_load(PROTOCOLS[kind])) if not hasattr(made, key)]:
        raise ConfigError(f"{name} does not do as {_article(kind)}: it has no {', '.join(lacks)}")
    return made


def options_of(kind: Kind, name: str) -> dict[str, inspect.Parameter]:
    """The options that a part takes, by name."""
    part = resolve(kind, name)
    if not _is_made(part):
        return {}
    takes = _Parameters.of(kind, part)
    if gathered := takes.gathered():
        return dict(inspect.signature(gathered).parameters)
    known = takes.known
    return {key: one.parameter for key, one in known.items() if key not in OFFERED[kind]}


def _is_made(part: Any) -> bool:
    """Whether a part is made by options: a class or a function, not an object that is there already."""
    return inspect.isclass(part) or inspect.isroutine(part)


@dataclass(frozen=True)
class _Parameter:
    """A parameter, and the names that are known where it is annotated."""

    parameter: inspect.Parameter
    scope: dict[str, Any]

    @property
    def is_needed(self) -> bool:
        return self.parameter.default is self.parameter.empty

    @property
    def hint(self) -> Any:
        """The type that is annotated; None if there is none, or one that only type checkers see."""
        if self.parameter.annotation is self.parameter.empty:
            return None
        holder = SimpleNamespace(__annotations__={"it": self.parameter.annotation})
        try:
            return typing.get_type_hints(holder, globalns=self.scope, include_extras=True)["it"]
        except NameError:
            return None

    def converted(self, value: Any, setting: str) -> Any:
        """A value as the type that is annotated; unchanged if that is not known."""
        hint = self.hint
        if hint is None:
            return value
        kinds = {hint, *typing.get_args(hint)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:  # pydantic takes true for 1
            raise ConfigError(f"{setting}: a number is expected, not {str(value).lower()}")
        try:
            return _adapter(hint).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{setting}: {_reason(error)}") from error


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except PydanticUserError:  # a type that brings settings of its own
        return TypeAdapter(hint)


@dataclass(frozen=True)
class _Parameters:
    """What a class or a function is called with.

    Attributes:
        known: Parameters by name; of a function without those that its Protocol fills. What a class hands on to its
            bases, by `**`, are theirs.
        any: Whether it takes others, too.
    """

    known: Mapping[str, _Parameter]
    any: bool

    @classmethod
    def of(cls, kind: Kind, part: Any) -> _Parameters:
        known, takes_any = _read(part)
        if not inspect.isclass(part):
            filled = len(_names(next(iter(_methods(_load(PROTOCOLS[kind])).values())))) - 1
            return cls({key: known[key] for key in [*known][filled:]}, takes_any)
        inits = [vars(base)["__init__"] for base in part.__mro__[:-1] if "__init__" in vars(base)]
        for init in inits[1:] if takes_any else ():
            more, takes_any = _read(init)
            known = {**dict([*more.items()][1:]), **known}  # without self
            if not takes_any:
                break
        return cls(known, takes_any)

    def gathered(self) -> type[BaseModel] | None:
        """The class of a parameter `options`, where that is a model of pydantic's: its fields are the options."""
        hint = self.known["options"].hint if "options" in self.known else None
        return hint if inspect.isclass(hint) and issubclass(hint, BaseModel) else None


def _validated(model: type[BaseModel], name: str, options: Mapping[str, Any], setting: str) -> BaseModel:
    if unknown := [str(key) for key in options if key not in model.model_fields]:
        has = ", ".join(sorted(model.model_fields))
        raise ConfigError(f"{setting}: {name} has no option {', '.join(unknown)}; it has {has}")
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        place = ".".join(map(str, (setting, *error.errors()[0]["loc"])))
        raise ConfigError(f"{place}: {_reason(error, with_place=False)}") from None


def _read(part: Any) -> tuple[dict[str, _Parameter], bool]:
    """Parameters of a function or class by name, and whether it takes further ones by `**`."""
    try:
        parameters = inspect.signature(part).parameters
    except ValueError:  # of a class that is written in C
        return {}, False
    spread = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = {key: _Parameter(one, _scope(part, key)) for key, one in parameters.items() if one.kind not in spread}
    return found, any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _scope(part: Any, key: str) -> dict[str, Any]:
    """Names that are known where a parameter is annotated: for a dataclass, in the module of the class that has it."""
    if dataclasses.is_dataclass(part) and inspect.isclass(part):
        for base in part.__mro__:
            if key in vars(base).get("__annotations__", {}) and base.__module__ in sys.modules:
                return vars(sys.modules[base.__module__])
    function = part.__init__ if inspect.isclass(part) else part
    return getattr(inspect.unwrap(function), "__globals__", {})


def _load(path: str) -> Any:
    module_name, _, attributes = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as an installed command is not started with it
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # anybody's module may raise anything
        if path in OURS:
            raise  # this installation is broken
        hint = ""
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            hint = f" (it is neither installed, nor on PYTHONPATH, nor in {here})"
        raise ConfigError(f"{path}: cannot import {module_name}: {_reason(error)}{hint}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            public = [name for name in vars(found) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, public, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: {getattr(found, '__name__', found)} has no {attribute}{hint}")
        found = getattr(found, attribute)
    return found


def _reason(error: BaseException, *, with_place: bool = True) -> str:
    """What an error says, in a line; the name of its class where that says more."""
    if isinstance(error, ValidationError):
        told = error.errors()[0]
        place = ".".join(map(str, told["loc"])) if with_place else ""
        message = told["msg"].removeprefix("Value error, ")
        got = "" if told["type"] in (SECRET, "missing", "value_error") else f" (got {told['input']!r})"
        return f"{place + ': ' if place else ''}{message}{got}"
    said = first_line(error)
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def _missing(kind: Kind, part: Any) -> Iterator[str]:
    """What a part lacks of its Protocol's methods, in words."""
    methods = _methods(_load(PROTOCOLS[kind]))
    if inspect.isroutine(part):  # a function stands for an object with a single method
        if len(methods) > 1:
            yield f"it is a function, and {', '.join(methods)} are methods of a class"
        elif not _takes(part, (wanted := next(iter(methods.values()))), bound=True, partly=True):
            yield f"it does not take ({', '.join(_names(wanted)[1:])})"
        return
    for name, wanted in methods.items():
        has, bound = _method(part, name)
        if not callable(has):
            yield "it cannot be called" if name == "__call__" else f"it has no {name}"
        elif not _takes(has, wanted, bound=bound):
            yield f"{'a call' if name == '__call__' else name} does not take ({', '.join(_names(wanted)[1:])})"


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


def _method(part: Any, name: str) -> tuple[Any, bool]:
    """A method of a class or of an object, and whether it needs no `self` when it is called."""
    if not inspect.isclass(part) and name in getattr(part, "__dict__", {}):
        return getattr(part, name), True
    kind = part if inspect.isclass(part) else type(part)
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    if isinstance(found, staticmethod | classmethod):
        return found.__func__, isinstance(found, staticmethod)
    return found, False


def _takes(has: Any, wanted: Callable[..., Any], *, bound: bool, partly: bool = False) -> bool:
    """Whether a function can be called as a method of a Protocol is.

    Args:
        has: The function.
        wanted: The Protocol's method.
        bound: Whether it is called without `self`.
        partly: Whether it may need more, which then are its options.
    """
    by_name = [each.name for each in inspect.signature(wanted).parameters.values() if each.kind is each.KEYWORD_ONLY]
    try:
        signature = inspect.signature(has)
    except ValueError:  # of a function that is written in C
        return True
    try:
        (signature.bind_partial if partly else signature.bind)(
            *_names(wanted)[1 if bound else 0 :], **dict.fromkeys(by_name)
        )
    except TypeError:
        return False
    return True


def _names(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that are given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def _article(kind: Kind) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
