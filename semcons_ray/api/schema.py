"""The JSON Schema of YAML files, by which editors complete them and mark what is wrong.

It says what single settings may be. What settings ask of each other is checked when a file is read.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from semcons_ray.config import ExperimentConfig, Settings, is_option, setting_keys

Schema = dict[str, Any]

STUDIES = ("compare", "sweep")
KINDS = ("run", *STUDIES)
"""Commands whose files have a schema."""


def schema_text(kind: str) -> str:
    """The schema of a command's files, as text."""
    return json.dumps(build_schema(kind), indent=1, ensure_ascii=False) + "\n"


def build_schema(kind: str) -> Schema:
    """The JSON Schema, draft 2020-12, of a command's files: settings of an experiment, a comparison or a sweep."""
    if kind == "run":
        return _schema(ExperimentConfig)
    from semcons_ray.studies.comparison import ComparisonConfig
    from semcons_ray.studies.search_space import SweepConfig

    experiment = _schema(ExperimentConfig)
    study = _schema(ComparisonConfig if kind == "compare" else SweepConfig)
    definitions = experiment.pop("$defs") | study.get("$defs", {}) | {"Experiment": experiment}
    settings, keys = _empty_or({"$ref": "#/$defs/Experiment"}), study["properties"]
    keys["experiment"] = settings
    if kind == "compare":
        keys["arms"] = {**keys["arms"], "additionalProperties": settings}
    else:  # keys may be dotted or nested
        axis = keys["space"].pop("additionalProperties")
        dotted = {key: axis for key in setting_keys() if key != "name"}
        nested = {key: {"type": "object"} for key in experiment["properties"] if key not in {"name", *dotted}}
        options = "|".join(re.escape(key) for key in setting_keys() if is_option(f"{key}.x"))
        keys["space"] |= {
            "properties": dotted | nested,
            "patternProperties": {f"^({options})\\.\\w+$": axis},
            "additionalProperties": False,
        }
    return study | {"$defs": definitions}


class _Generator(GenerateJsonSchema):
    """Without titles, which would only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schema(kind: type[Settings]) -> Schema:
    schema = kind.model_json_schema(schema_generator=_Generator)
    for part in [schema, *schema.get("$defs", {}).values()]:
        part.pop("title", None)
        for key, field in part.get("properties", {}).items():
            if "$ref" in field:  # a section may be empty, and its defaults stand in its own schema
                part["properties"][key] = _empty_or({"$ref": field["$ref"]})
    return {"$schema": GenerateJsonSchema.schema_dialect} | schema


def _empty_or(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
