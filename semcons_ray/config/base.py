"""What all settings have in common."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

SomeSettings = TypeVar("SomeSettings", bound="Settings")


class Settings(BaseModel):
    """Base class of every section: instances are frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, values: Any) -> Any:
        """YAML reads a section that has only its name as None; here it stands for the section's defaults."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in fields or not isinstance(fields[key].default, Settings)
        }

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and so pydantic, takes true for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {kind, *get_args(kind)} & {int, float}:
            raise ValueError(f"a number is expected, not {str(value).lower()}")
        return value
