"""The type of settings that name a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from semcons_ray.errors import ConfigError
from semcons_ray.parts.find import names, resolve
from semcons_ray.parts.table import BUILT_IN, Kind

STORED = "stored"
"""Key of the context with which settings of a finished run are read: its parts need not be there any more."""


@dataclass(frozen=True)
class PartName:
    """Annotates a text that names a part of a kind: `rule: Annotated[str, PartName("rule")]`."""

    kind: Kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": [*BUILT_IN[self.kind]]}, {"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}]}

    def _check(self, name: str, info: ValidationInfo) -> str:
        if name not in BUILT_IN[self.kind] and not (info.context or {}).get(STORED):
            try:
                resolve(self.kind, name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return name

    def choices(self) -> list[str]:
        """The names that there are."""
        return [*names(self.kind)]
