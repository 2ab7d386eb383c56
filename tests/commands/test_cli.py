import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from semcons_ray.commands.cli import _split_settings, main
from semcons_ray.config import ExperimentConfig, load_config


def test_init_writes_every_setting_and_run_can_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "config.yaml"
    assert capsys.readouterr().out.strip() == str(path)
    assert load_config(path) == ExperimentConfig()
    assert set(yaml.safe_load(path.read_text())) == set(ExperimentConfig.model_fields)
    assert "# " in path.read_text()


@pytest.mark.parametrize(
    "command",
    [
        *("init", "schema", "doctor", "run", "resume", "compare", "sweep", "report", "labels", "attack", "replay"),
        *("break-even", "show", "cost"),
    ],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: semcons {command}" in text
    assert len(text.splitlines()) > 5


def test_help_of_run_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for section, field in ExperimentConfig.model_fields.items():
        names = getattr(field.annotation, "model_fields", None)
        for name in [f"{section}.{key}" for key in names] if names else [section]:
            assert f"--{name}" in text
    assert "--algorithm.rule [medoid]" in text


def test_without_cudas_libraries_one_line_points_to_doctor(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "semcons_ray.commands.cli", "run", "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "semcons: libcudnn.so.9: cannot open shared object file; `semcons doctor` says what is missing\n"
    )


def test_settings_on_the_command_line_are_parted_from_other_words_and_read_as_their_setting_is() -> None:
    words = [
        "run", "my.yaml", "--training.learning_rate", "1e-3", "--out", "there", "--name=2024", "--seed", "-1",
        "--model.system_prompt", "You are a tutor: be brief", "--model.lora.rank=4", "--resources.ray_address", "",
        "--data.source=a=b.csv",
    ]  # fmt: skip
    others, nested = _split_settings(words)
    assert others == ["run", "my.yaml", "--out", "there"]
    files = ["run", "a.yaml", "--dry-run", "b.yaml", "--seed", "1", "--out", "there", "c.yaml", "--out=x"]
    assert _split_settings(files)[0] == ["run", "a.yaml", "b.yaml", "c.yaml", "--dry-run", "--out", "there", "--out=x"]
    assert nested == {
        "training": {"learning_rate": 0.001},
        "name": "2024",
        "seed": -1,
        "model": {"system_prompt": "You are a tutor: be brief", "lora": {"rank": 4}},
        "resources": {"ray_address": None},
        "data": {"source": "a=b.csv"},
    }
    config = load_config(None, {**nested, "seed": 0})
    assert (config.training.learning_rate, config.model.lora.rank, config.name) == (0.001, 4, "2024")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed"], "--seed needs a value"),
        (["--seed", "--out"], "--seed needs a value"),
        (["--clients.mix", "{a"], "--clients.mix: cannot read '{a'"),
        (["--model", "3", "--model.name", "a"], "--model.name: model was given a value itself"),
        (["--name.first", "a", "--out", "x"], "name: Input should be a valid string"),
        (["--training.learning_rate", "fast"], "training.learning_rate: Input should be a valid number"),
        (["--seed", "1_0_", "--out", "x"], "seed: Input should be a valid integer"),
    ],
)
def test_settings_on_the_command_line_that_cannot_be_are_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words, *([] if "--out" in words else ["--out", str(tmp_path / "run")])]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_doctor_prints_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) in (0, 2)
    assert "torch" in capsys.readouterr().out


def test_cost_states_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--model", "llama-3.1-405b"]) == 0
    assert "1011" in capsys.readouterr().out.replace(",", "")
