"""Makes a JSON Schema of a custom resource definition of KubeRay: python reduce.py FILE VERSION > rayjob-VERSION.json

FILE is helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of ray-project/kuberay at the tag of that version. Of its
1.3 MB the rules for a RayJob's `spec` are left, which has a RayCluster's in it; what comes several times, as pods do,
is there once. As by kubectl, fields that are not named are refused.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

RULES = {"type", "properties", "items", "additionalProperties", "required", "enum", "pattern", "anyOf", "oneOf",
         "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}  # fmt: skip


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Only what rules say, and no unknown fields."""
    kept = {name: rule for name, rule in schema.items() if name in RULES}
    if "properties" in kept:
        kept["properties"] = {name: strict(inner) for name, inner in kept["properties"].items()}
        kept["additionalProperties"] = False
    elif isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(kept["additionalProperties"])
    if "items" in kept:
        kept["items"] = strict(kept["items"])
    return kept


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, with schemas that come several times under `$defs`."""
    counts: Counter[str] = Counter()
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def count(part: Any) -> None:
        if isinstance(part, dict):
            text = json.dumps(part)
            counts[text] += "type" in part and len(text) > 60
            if counts[text] < 2:
                for inner in part.values():
                    count(inner)

    def refer(part: Any, *, whole: bool = False) -> Any:
        if not isinstance(part, dict):
            return part
        text = json.dumps(part)
        if whole or counts[text] < 2:
            return {name: refer(inner) for name, inner in part.items()}
        if text not in names:
            names[text] = str(len(names))
            definitions[names[text]] = refer(part, whole=True)
        return {"$ref": f"#/$defs/{names[text]}"}

    count(schema)
    return {**refer(schema, whole=True), "$defs": definitions}


if __name__ == "__main__":
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    comment = f"ray.io_rayjobs.yaml of ray-project/kuberay v{sys.argv[2]}, Apache License 2.0; changed by reduce.py"
    spec = strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    print(json.dumps({"$comment": comment, **shared(spec)}, separators=(",", ":")))
