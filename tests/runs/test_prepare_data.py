"""What of the data is not used: kept in the run's folder, told before any model is looked for, refused over half."""

import json
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.errors import ConfigError, DataError, ModelError, RunFolderError
from semcons_ray.runs.assembly import prepare_data
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.run_folder import RunFolder
from tests.invariants.runs import Silent
from tests.tiny import examples


def config(folder: Path, rows: list[dict[str, str]], **data: Any) -> ExperimentConfig:
    """Of an experiment that ends where its model is looked for."""
    source = folder / "data[b].jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data": {"source": str(source), "examples_per_client": 20, "num_test": 24, **data},
        "model": {"name": str(folder / "none")},
        "resources": {"fleet": "local", "device": "cpu"},
    }
    return validate_config(values, where="test")


def rows(num_long: int) -> list[dict[str, str]]:
    return [
        {**row, "response": row["response"] + " and so on" * 45 * (n < num_long)} for n, row in enumerate(examples())
    ]


def test_what_is_left_out_is_counted_in_the_folder_and_once(tmp_path: Path) -> None:
    settings = config(tmp_path, rows(num_long=100))
    folder = RunFolder.create(tmp_path / "run", settings)
    split = prepare_data(settings, folder)
    counted = folder.data_report.read_bytes()
    (tally,) = folder.tallies()
    assert (tally.total, tally.lost, tally.is_warning) == (432, 100, True)
    Path(settings.data.source).unlink()
    assert prepare_data(settings, folder) == split
    assert folder.data_report.read_bytes() == counted


@pytest.mark.parametrize(("num_long", "warning"), [(0, False), (4, False), (5, True), (216, True)])
def test_it_is_told_before_a_model_is_looked_for_and_when_resumed(tmp_path: Path, num_long: int, warning: bool) -> None:
    settings = config(tmp_path, rows(num_long))
    for start in (lambda seen: run_experiment(settings, tmp_path / "run", seen),
                  lambda seen: resume_experiment(tmp_path / "run", seen)):  # fmt: skip
        observer = Silent()
        with pytest.raises(ModelError):
            start(observer)
        assert observer.plan.startswith("warning: ") == warning
        assert f"{num_long} of 432 rows left out" in observer.plan
        assert ("with a response over data.max_response_chars 400" in observer.plan) == (num_long > 0)


def test_over_half_is_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    settings = config(tmp_path, rows(num_long=217))
    folder = RunFolder.create(tmp_path / "run", settings)
    with pytest.raises(DataError) as raised:
        prepare_data(settings, folder)
    assert str(raised.value) == (
        f"data.source {settings.data.source} (columns prompt, response, category): 217 of 432 rows left out (217 with "
        "a response over data.max_response_chars 400). That is over half: raise data.max_response_chars"
    )
    assert not folder.data.exists()


def test_the_error_for_too_little_data_says_what_was_left_out(tmp_path: Path) -> None:
    settings = config(tmp_path, rows(num_long=100), examples_per_client=80)
    with pytest.raises(DataError, match=r"and there are 332; .* 100 of 432 rows left out \(100 with a response over"):
        prepare_data(settings, RunFolder.create(tmp_path / "run", settings))


def test_test_set_and_public_prompts_may_come_from_elsewhere(tmp_path: Path) -> None:
    held_out = [{"question": row["prompt"].upper(), "answer": row["response"]} for row in examples()[:40]]
    asked = [{"prompt": f"what is {n}?"} for n in range(30)] + [{"prompt": row["prompt"]} for row in examples()[:5]]
    for name, content in (("test.jsonl", held_out), ("asked.jsonl", asked)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    settings = config(tmp_path, rows(num_long=0), test_source=str(tmp_path / "test.jsonl"))
    prompts = {"source": str(tmp_path / "asked.jsonl"), "budget": 8}
    settings = validate_config(settings.model_dump() | {"prompts": prompts}, where="test")
    folder = RunFolder.create(tmp_path / "run", settings)
    split = prepare_data(settings, folder)
    assert {example.prompt for example in split.test} <= {row["question"] for row in held_out}
    assert {example.prompt for example in split.public} <= {row["prompt"] for row in asked[:30]}
    assert {example.response for example in split.public} == {""}
    tested = {row["question"].lower() for row in held_out}
    assert not any(example.prompt in tested for share in split.private for example in share)
    source, test, public = folder.tallies()
    assert str(source).startswith(f"data.source {settings.data.source} (columns prompt, response, category): 40 of ")
    assert "40 with a prompt of the test set" in str(source)
    assert str(test).startswith(f"data.test_source {tmp_path / 'test.jsonl'} (columns question as prompt, answer as ")
    assert str(public).startswith(f"prompts.source {tmp_path / 'asked.jsonl'} (columns prompt): 5 of 35 rows left out")
    reference = validate_config(settings.model_dump() | {"algorithm": {"rule": "reference"}}, where="test")
    with pytest.raises(DataError, match=r"asked\.jsonl is of no known format: it has prompt; say which is which"):
        prepare_data(reference, RunFolder.create(tmp_path / "reference", reference))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": {"test_subset": "main"}}, "data.test_subset main has no effect: it needs data.test_source"),
        ({"prompts": {"subset": "main"}}, "prompts.subset main has no effect: it needs prompts.source"),
        ({"prompts": {"columns": {"prompt": "q"}}}, "has no effect: it needs prompts.source"),
        ({"data": {"columns": {"answer": "q"}}}, "data.columns"),
        ({"data": {"source": "org/x@main", "revision": "v1"}}, "revision v1 needs a data.source of the hub"),
        ({"data": {"revision": "v1"}}, "revision v1 needs a data.source of the hub"),
    ],
)
def test_settings_of_data_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate_config(settings, where="here")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_the_count_has_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config(tmp_path, rows(num_long=0)))
    assert folder.tallies() == ()
    folder.data_report.write_text("[{")
    with pytest.raises(RunFolderError, match=r"data_report\.json is damaged"):
        folder.tallies()
