"""Parts are found by name, checked before they are made, and what is wrong is one line."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from semcons_ray.config import ExperimentConfig, named_parts, validate_config
from semcons_ray.consensus import Election
from semcons_ray.errors import ConfigError
from semcons_ray.parts import (
    BUILT_IN,
    GROUPS,
    OFFERED,
    PROTOCOLS,
    Kind,
    build,
    check_options,
    names,
    options_of,
    resolve,
)
from tests.parts.conftest import Write

Install = Callable[[str, str], None]


def refusal(kind: Kind, name: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build(kind, name, options, setting="the.options")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The table


@pytest.mark.parametrize("kind", get_args(Kind))
def test_each_built_in_part_is_there_and_fits_its_protocol(kind: Kind) -> None:
    for name in BUILT_IN[kind]:
        resolve(kind, name)
        options_of(kind, name)


def test_each_kind_has_a_protocol_a_group_and_what_it_is_offered() -> None:
    assert {*get_args(Kind)} == {*BUILT_IN} == {*PROTOCOLS} == {*GROUPS} == {*OFFERED}
    assert GROUPS["rule"] == "semcons_ray.rules"
    assert GROUPS["policy"] == "semcons_ray.policies"


def test_settings_tell_which_parts_they_name() -> None:
    values = {"evaluation": {"metrics": ["chrF"], "num_answers": 1}, "tracking": {"report_to": ["tensorboard"]}}
    named = [*named_parts(validate_config(values, where="test"))]
    assert {*named} == {
        ("algorithm", "semantic_consensus"), ("rule", "medoid"), ("partition", "dirichlet"), ("metric", "chrF"),
        ("competence", "equal"), ("defence", "none"),
        ("selection", "stratified"), ("embedder", "sentence_transformers"), ("tracker", "tensorboard"),
        ("availability", "always"), ("policy", "synchronous"),
    }  # fmt: skip


# What cannot be found


def test_an_unknown_name_comes_with_the_nearest_one() -> None:
    said = refusal("rule", "mediod")
    assert said.startswith("there is no rule mediod (did you mean medoid?); there are medoid, plurality, ")
    assert said.endswith(" and any module:object")
    assert "did you mean" not in refusal("rule", "xyz")
    assert refusal("reader", "x") == "there is no reader x; give one as module:object"


@pytest.mark.parametrize("name", ["a:", ":b", "a b:c", "a:b:c", "a/b.py:c", ""])
def test_what_is_no_module_and_object_is_a_name_that_there_is_not(name: str) -> None:
    assert refusal("rule", name).startswith(f"there is no rule {name}")


def test_a_module_that_is_not_there_says_where_it_was_looked_for(working_folder: Path) -> None:
    assert refusal("rule", "no_such.module:x") == (
        "no_such.module:x: cannot import no_such.module: ModuleNotFoundError: No module named 'no_such' (it is neither "
        f"installed, nor on PYTHONPATH, nor in {working_folder})"
    )


def test_a_module_that_cannot_be_imported_says_why(module: Write) -> None:
    needs = module("import no_such_package\n")
    assert refusal("rule", f"{needs}:x") == (
        f"{needs}:x: cannot import {needs}: ModuleNotFoundError: No module named 'no_such_package'"
    )
    broken = module("def f(:\n")
    assert refusal("rule", f"{broken}:f").startswith(f"{broken}:f: cannot import {broken}: SyntaxError: ")
    ends = module("raise SystemExit(3)\n")
    assert refusal("rule", f"{ends}:f") == f"{ends}:f: cannot import {ends}: SystemExit: 3"


def test_an_object_that_is_not_in_its_module_comes_with_the_nearest_one(module: Write) -> None:
    name = module("class Softer:\n    inner = 3\n")
    assert refusal("rule", f"{name}:Soft") == f"{name}:Soft: {name} has no Soft; did you mean Softer?"
    assert refusal("rule", f"{name}:Softer.iner") == f"{name}:Softer.iner: Softer has no iner; did you mean inner?"


# What does not fit


ALGORITHM = """
class Whole:
    uses_public_prompts = False
    def first_state(self): return b""
    def downlinks(self, round, state, client_ids): return {}
    def run_round(self, round, state, fleet, server, *, evaluate): ...
    def visit(self, client, round, downlink): return b""
    def adopt(self, client, round, downlink): ...

class Less(Whole):
    visit = None

class Other(Whole):
    def visit(self, client): ...
    def run_round(self, round, state, fleet, server): ...

class Quiet(Whole):
    uses_public_prompts = property()

class Needy(Whole):
    def __init__(self, cohort, beta, *, gamma: float = 0.5): self.beta, self.gamma, self.cohort = beta, gamma, cohort

def function(): ...
whole = Whole()
number = 3
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Less", "it has no visit"),
        ("Other",
         "run_round does not take (round, state, fleet, server); visit does not take (client, round, downlink)"),
        ("number", "it has no first_state; it has no downlinks; it has no run_round; it has no visit; it has no adopt"),
        ("function", "it is a function, and first_state, downlinks, run_round, visit, adopt are methods of a class"),
        ("Quiet", "it has no uses_public_prompts"),
    ],
)  # fmt: skip
def test_what_a_class_lacks_of_its_protocol_is_named(module: Write, name: str, says: str) -> None:
    path = f"{module(ALGORITHM)}:{name}"
    assert refusal("algorithm", path) == f"{path} does not do as an algorithm: {says}"


def test_a_function_that_takes_something_else_is_no_rule(module: Write) -> None:
    path = f"{module('def rule(): ...')}:rule"
    assert refusal("rule", path) == f"{path} does not do as a rule: it does not take (ballots)"
    path = f"{module('class Rule: ...')}:Rule"
    assert refusal("rule", path) == f"{path} does not do as a rule: it cannot be called"


def test_an_object_that_is_made_already_is_taken_as_it_is_and_has_no_options(module: Write) -> None:
    path = f"{module(ALGORITHM)}:whole"
    assert type(build("algorithm", path, setting="x")).__name__ == "Whole"
    assert refusal("algorithm", path, beta=1) == (
        f"the.options: {path} is an object that is made already, and takes no options"
    )


# Options


RULES = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal
from pydantic import Field
if TYPE_CHECKING:
    from somewhere import Ballots, Tensor, Kind

@dataclass(frozen=True)
class Soft:
    temperature: Annotated[float, Field(gt=0)] = 0.1
    steps: int = 3
    kind: Kind = None
    how: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.steps > 9:
            raise ValueError("steps goes up to 9")
        assert self.steps != 7, "not seven"

    def __call__(self, ballots: Ballots) -> Tensor:
        return ballots.similarity * self.temperature

def scaled(ballots: Ballots, factor: float, *, offset: float = 0.0) -> Tensor:
    return ballots.similarity * factor + offset

class Base:
    def __init__(self, *, low: float = 0.0): self.low = low
    def __call__(self, ballots): return ballots.similarity

class Derived(Base):
    def __init__(self, *, high: int = 1, **more):
        super().__init__(**more)
        self.high = high

class Anything:
    def __init__(self, **options): self.options = options
    def __call__(self, ballots): return ballots.similarity
"""


def test_options_are_converted_to_the_types_of_their_parameters(module: Write) -> None:
    name = module(RULES)
    made = build("rule", f"{name}:Soft", {"temperature": 1, "steps": 4.0, "kind": [1]}, setting="x")
    assert (made.temperature, made.steps, made.kind) == (1.0, 4, [1])  # only type checkers know what Kind is
    assert isinstance(made.temperature, float)
    assert isinstance(made.steps, int)
    derived = build("rule", f"{name}:Derived", {"high": 2, "low": 3}, setting="x")
    assert (derived.high, derived.low, type(derived.low)) == (2, 3.0, float)
    assert build("rule", f"{name}:Anything", {"a": 1}, setting="x").options == {"a": 1}


def test_an_inherited_field_is_of_a_type_that_the_base_knows(module: Write) -> None:
    base = module(RULES)
    heir = module(
        f"from dataclasses import dataclass\nfrom {base} import Soft\n"
        "@dataclass(frozen=True)\nclass Heir(Soft):\n    more: int = 1\n"
    )
    assert build("rule", f"{heir}:Heir", {"temperature": "0.5"}, setting="x").temperature == 0.5
    assert refusal("rule", f"{heir}:Heir", temperature=0).startswith("the.options.temperature: Input should be greater")


def test_a_functions_options_are_its_parameters_after_those_of_the_protocol(module: Write) -> None:
    path = f"{module(RULES)}:scaled"
    assert [*options_of("rule", path)] == ["factor", "offset"]
    rule = Election(path, {"factor": 2}).scores()

    class Three:
        similarity = torch.tensor([3.0])

    assert rule(Three()) == torch.tensor([6.0])  # type: ignore[arg-type]
    assert refusal("rule", path) == f"the.options: {path} needs factor"
    assert refusal("rule", path, ballots=1, factor=1).startswith(f"the.options: {path} has no option ballots; it has ")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Soft", {"temprature": 1}, "the.options: {} has no option temprature; it has how, kind, steps, temperature"),
        ("Soft", {"temperature": "warm"},
         "the.options.temperature: Input should be a valid number, unable to parse string as a number (got 'warm')"),
        ("Soft", {"temperature": 0}, "the.options.temperature: Input should be greater than 0 (got 0)"),
        ("Soft", {"temperature": True}, "the.options.temperature: a number is expected, not true"),
        ("Soft", {"temperature": float("nan")},
         "the.options.temperature: Input should be a finite number (got nan)"),
        ("Soft", {"how": "c"}, "the.options.how: Input should be 'a' or 'b' (got 'c')"),
        ("Soft", {"steps": 10}, "the.options: {} refuses its options: steps goes up to 9"),
        ("Soft", {"steps": 7}, "the.options: {} refuses its options: AssertionError: not seven"),
        ("Derived", {"middle": 1}, "the.options: {} has no option middle; it has high, low"),
        ("Derived", {"low": "x"},
         "the.options.low: Input should be a valid number, unable to parse string as a number (got 'x')"),
        ("Base", {"high": 1}, "the.options: {} has no option high; it has low"),
    ],
)  # fmt: skip
def test_an_option_that_a_part_cannot_use_is_refused_in_one_line(
    module: Write, name: str, options: dict[str, object], says: str
) -> None:
    path = f"{module(RULES)}:{name}"
    assert refusal("rule", path, **options) == says.format(path)


def test_what_a_class_is_offered_is_no_option_and_what_else_it_needs_is(module: Write) -> None:
    path = f"{module(ALGORITHM)}:Needy"
    assert [*options_of("algorithm", path)] == ["beta", "gamma"]
    offered = {"cohort": "all", "ranks": (1,)}
    made = build("algorithm", path, {"beta": 1}, setting="x", offered=offered)
    assert (made.cohort, made.beta, made.gamma) == ("all", 1, 0.5)
    assert refusal("algorithm", path) == f"the.options: {path} needs beta"
    assert refusal("algorithm", path, beta=1, cohort=2) == (
        f"the.options: {path} has no option cohort; it has beta, gamma"
    )


def test_options_are_checked_without_making_the_part(module: Write) -> None:
    text = "class Rule:\n    def __init__(self, x: int): raise SystemError\n    def __call__(self, ballots): ..."
    name = module(text)
    assert check_options("rule", f"{name}:Rule", {"x": "3"}, "x") == {"x": 3}


# Names that packages give


def test_a_package_gives_names_by_entry_points(module: Write, package: Install) -> None:
    name = module(RULES)
    package("lab", f"[semcons_ray.rules]\nlab_soft = {name}:Soft\n[semcons_ray.metrics]\nother = {name}:x\n")
    assert names("rule")["lab_soft"] == f"{name}:Soft"
    assert "lab_soft" not in names("metric")
    assert build("rule", "lab_soft", {"steps": 2}, setting="x").steps == 2
    assert refusal("rule", "lab_sift").startswith("there is no rule lab_sift (did you mean lab_soft?); there are ")
    config = validate_config({"algorithm": {"rule": "lab_soft", "rule_options": {"steps": 2}}}, where="test")
    assert config.algorithm.options_of_rule == {"steps": 2}


def test_a_name_that_two_have_is_refused_when_it_is_named(module: Write, package: Install) -> None:
    name = module(RULES)
    package("one", f"[semcons_ray.rules]\nsame = {name}:Soft\nmedoid = {name}:Soft\n")
    package("two", f"[semcons_ray.rules]\nsame = {name}:Derived\nalone = {name}:Derived\n")
    assert refusal("rule", "same") == (
        "there are several rules same, of package one and of package two; say which by module:object"
    )
    built_in = "there are several rules medoid, built in and of package one; say which by module:object"
    assert refusal("rule", "medoid") == built_in
    with pytest.raises(ConfigError, match=f"^here: algorithm.rule: {built_in} "):
        validate_config({"algorithm": {"rule": "medoid"}}, where="here")
    assert type(build("rule", "alone", setting="x")).__name__ == "Derived"
    assert type(build("rule", f"{name}:Soft", setting="x")).__name__ == "Soft"


# In settings


def settings_refused(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_config(values, where="here")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("here: ")


def test_a_part_of_ones_own_is_checked_with_the_settings(module: Write) -> None:
    name = module(RULES)
    config = validate_config({"algorithm": {"rule": f"{name}:Soft"}}, where="here")
    assert isinstance(config, ExperimentConfig)
    said = settings_refused({"algorithm": {"rule": f"{name}:Sofd"}})
    assert said == f"algorithm.rule: {name}:Sofd: {name} has no Sofd; did you mean Soft? (got '{name}:Sofd')"
    said = settings_refused({"algorithm": {"rule": f"{name}:Soft", "rule_options": {"steps": "x"}}})
    assert said.startswith("algorithm.rule_options.steps: Input should be a valid integer")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"algorithm": {"rule_options": {"t": 1}}}, "algorithm.rule_options {'t': 1} has no effect: it needs an "),
        ({"algorithm": {"rule": "trimmed", "rule_options": {"trim": 0}}}, "algorithm.rule_options {'trim': 0} has no "),
        ({"algorithm": {"options": {"t": 1}}}, "algorithm.options {'t': 1} has no effect: it needs an algorithm.name"),
        ({"data": {"partition_options": {"t": 1}}}, "data.partition_options {'t': 1} has no effect: it needs a "),
        ({"data": {"reader_options": {"t": 1}}}, "data.reader_options {'t': 1} has no effect: it needs data.reader"),
        ({"prompts": {"selection_options": {"t": 1}}}, "prompts.selection_options {'t': 1} has no effect: it needs a "),
        ({"server": {"embedder_options": {"t": 1}}}, "server.embedder_options {'t': 1} has no effect: it needs a "),
        ({"evaluation": {"metric_options": {"chrF": {"t": 1}}}},
         "evaluation.metric_options has options of chrF, and evaluation.metrics does not name it"),
        ({"tracking": {"options": {"wandb": {"t": 1}}}},
         "tracking.options has options of wandb, and tracking.report_to does not name it"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(values: dict[str, object], says: str) -> None:
    assert settings_refused(values).startswith(says)


def test_options_that_runs_share_hold_only_where_the_rule_has_some(module: Write) -> None:
    options = {"algorithm": {"rule_options": {"steps": 2}}}
    own = {"algorithm": {"rule": f"{module(RULES)}:Soft", **options["algorithm"]}}
    assert validate_config(own, where="arm", shared=options).algorithm.rule_options == {"steps": 2}
    medoid = {"algorithm": {"rule": "medoid", **options["algorithm"]}}
    assert validate_config(medoid, where="arm", shared=options).algorithm.rule_options == {}
