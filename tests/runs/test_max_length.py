"""`model.max_length`: null is what the models can read, and what is longer than that is refused before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config, parse_setting
from semcons_ray.errors import ModelError
from semcons_ray.runs.experiment import plan_experiment, resume_experiment, run_experiment
from tests.invariants.runs import Silent
from tests.tiny import write_model

Make = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=80)


def test_null_is_the_models_own_limit_and_is_resolved_in_the_run(
    short: Path, tmp_path: Path, tiny_config: Make
) -> None:
    assert parse_setting("model.max_length", "null") is None
    config = tiny_config(num_rounds=1, model={"name": str(short), "max_length": None})
    run = tmp_path / "run"
    run_experiment(config, run, Silent())
    for name in ("config.yaml", "state/config.yaml"):
        resolved = yaml.safe_load((run / name).read_text(encoding="utf-8"))
        assert resolved["model"]["max_length"] == 80 - 8  # less generation.max_new_tokens
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    resume_experiment(run, Silent())


def test_clients_settings_and_several_models_count(short: Path, tiny_llama: Path, tiny_config: Make) -> None:
    own = {"num_clients": 3, "overrides": {0: {"generation": {"max_new_tokens": 20}}}}
    mixed = own | {"mix": {str(short): 1, str(tiny_llama): 2}}
    for clients, expected in ((own, 60), (mixed, 60), (mixed | {"overrides": {}}, 72)):
        config = tiny_config(clients=clients, model={"name": str(short), "max_length": None})
        assert plan_experiment(config, Silent()).placement.config.model.max_length == expected


def test_what_cannot_be_is_refused_with_both_numbers(
    short: Path, tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(tiny_config(model={"name": str(short), "max_length": 73})), encoding="utf-8")
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "has 80 positions, and model.max_length 73 + generation.max_new_tokens 8 are 81; lower one of them" in said
    answers = tiny_config(model={"name": str(short), "max_length": None}, generation={"max_new_tokens": 73})
    with pytest.raises(ModelError, match=r"has 80 positions, and generation\.max_new_tokens is 73; lower it"):
        plan_experiment(answers, Silent())
    endless = write_model(tmp_path / "endless", "mamba")
    with pytest.raises(ModelError, match=r"^model\.max_length null needs a number: .*endless can read any number"):
        plan_experiment(tiny_config(model={"name": str(endless), "max_length": None}), Silent())
