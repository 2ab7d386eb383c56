import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from semcons_ray.api.schema import KINDS, build_schema
from semcons_ray.commands.cli import main
from semcons_ray.commands.init import PRESETS
from semcons_ray.config import (
    ExperimentConfig,
    changed_settings,
    describe_settings,
    dump_config,
    parse_yaml,
    read_yaml,
    setting_keys,
)
from semcons_ray.studies.comparison import dump_comparison, load_comparison
from semcons_ray.studies.search_space import dump_sweep, load_sweep

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCHEMAS = {kind: Draft202012Validator(build_schema(kind)) for kind in KINDS}


def mistakes(kind: str, values: Any) -> list[str]:
    """Where a file is wrong by its schema: paths of values, with their unknown keys."""
    found = []
    for error in SCHEMAS[kind].iter_errors(values):
        while error.context:  # of the branches of a union, the one that goes deepest
            error = max(error.context, key=lambda each: len(each.absolute_path))
        found.append(f"{'.'.join(map(str, error.absolute_path))}: {error.message}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_is_one_and_is_printed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(build_schema(kind))
    assert main(["schema", *([] if kind == "run" else [kind])]) == 0
    assert json.loads(capsys.readouterr().out) == build_schema(kind)


def kind_of(path: Path) -> str:
    keys = read_yaml(path).keys()
    return "sweep" if "space" in keys else "compare" if keys & {"experiment", "arms"} else "run"


FILES = sorted([*EXPERIMENTS.rglob("*.yaml"), *PRESETS.values()])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_committed_file_is_right_by_its_schema(path: Path) -> None:
    assert mistakes(kind_of(path), read_yaml(path)) == []


def test_what_is_written_is_right_by_its_schema() -> None:
    assert mistakes("run", parse_yaml(describe_settings(as_yaml=True))) == []
    assert mistakes("run", parse_yaml(dump_config(ExperimentConfig()))) == []
    assert mistakes("compare", parse_yaml(dump_comparison(load_comparison(None)))) == []
    sweep = load_sweep(EXPERIMENTS / "sweeps/crossed.yaml")
    assert mistakes("sweep", parse_yaml(dump_sweep(sweep))) == []
    assert mistakes("sweep", {"space": {"prompts": {"budget": {"grid": [1]}}, "seed": {"grid": [1, 2]}}}) == []
    assert mistakes("sweep", {"space": {"algorithm.rule_options.temperature": {"grid": [0.1]}}}) == []
    assert mistakes("run", {"algorithm": {"rule": "lab.rules:Soft"}, "evaluation": {"metrics": ["a.b:c", "nll"]}}) == []


@pytest.mark.parametrize(
    ("kind", "text", "where"),
    [
        ("run", "modle: {}", ": Additional properties"),
        ("run", "model: {lora: {rang: 4}}", "model.lora: Additional properties"),
        ("run", "num_rounds: 0", "num_rounds: 0 is less than"),
        ("run", "algorithm: {rule: best}", "algorithm.rule: 'best' is not one of"),
        ("run", "clients: {lora_ranks: [0]}", "clients.lora_ranks.0: 0 is less"),
        ("run", "training: {learning_rate: fast}", "training.learning_rate: 'fast' is not of type 'number'"),
        ("run", "data: {columns: {promt: a}}", "data.columns: 'promt' is not one of"),
        ("compare", "experiment: {modle: {}}", "experiment: Additional properties"),
        ("compare", "arms: {a: {algorithm: {nam: flora}}}", "arms.a.algorithm: Additional properties"),
        ("compare", "seed: [1]", ": Additional properties"),
        ("sweep", "space: {prompts.bugdet: {grid: [1]}}", "space: 'prompts.bugdet' does not match any of"),
        ("sweep", "space: {prompts.budget: {gird: [1]}}", "space.prompts.budget: Additional properties"),
        ("sweep", "experiment: {}", ": 'space' is a required property"),
    ],
)
def test_a_mistake_is_marked(kind: str, text: str, where: str) -> None:
    (found,) = mistakes(kind, parse_yaml(text))
    assert found.startswith(where)


@pytest.mark.parametrize("text", ["model:\n", "model: {lora: }", "seed: 1\nmodel: {max_length: 8}"])
def test_a_section_may_be_empty_or_incomplete(text: str) -> None:
    assert mistakes("run", parse_yaml(text)) == []


def test_every_setting_has_its_description_its_default_and_its_choices() -> None:
    schema = build_schema("run")
    for key in setting_keys():
        part: dict[str, Any] = schema
        for name in key.split("."):
            field = part["properties"][name]
            reference = field.get("anyOf", [{}])[0].get("$ref", "")
            part = schema["$defs"][reference.rpartition("/")[2]] if reference else field
        assert part.get("description") or key == "model.chat_template_kwargs", key
        assert "default" in part or part.get("type") in ("object", ["object", "null"]), key
    assert "medoid" in schema["$defs"]["AlgorithmConfig"]["properties"]["rule"]["anyOf"][0]["enum"]
    assert "title" not in json.dumps(schema["$defs"]["ModelConfig"])


def test_nothing_is_changed_in_the_defaults() -> None:
    assert changed_settings(ExperimentConfig()) == {}
