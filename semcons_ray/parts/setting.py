"""The type of settings that name a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from semcons_ray.errors import ConfigError
from semcons_ray.parts.find import PATH, names, path_of, resolve
from semcons_ray.parts.table import BUILT_IN, Kind

STORED = "stored"
"""Key of the context with which settings of a run are read only to show them: its parts need not be there any more."""


@dataclass(frozen=True)
class PartName:
    """Annotates a text that names a part of a kind: `rule: Annotated[str, PartName("rule")]`."""

    kind: Kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        own = {"type": "string", "pattern": f"^{PATH}$"}
        return {"anyOf": [{"enum": known}, own]} if (known := self.choices()) else own

    def _check(self, name: str, info: ValidationInfo) -> str:
        if not (info.context or {}).get(STORED):
            try:  # a built-in part fits, and need not be imported to see that
                (path_of if name in BUILT_IN[self.kind] else resolve)(self.kind, name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return name

    def choices(self) -> list[str]:
        """The names that there are."""
        return [*names(self.kind)]


def part_names(annotation: Any) -> list[PartName]:
    """The kinds of parts that a setting of this type names, itself or by what it holds."""
    inner = [found for one in get_args(annotation) for found in part_names(one)]
    return [annotation] if isinstance(annotation, PartName) else inner
