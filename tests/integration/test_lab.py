"""The package of examples/, installed as a distribution: its parts run without a change of this package."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import yaml

from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [pytest.mark.packages, pytest.mark.slow, pytest.mark.real]

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "examples" / "semcons_ray_lab", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    command = [*pip, "--disable-pip-version-check", "--target", str(folder / "installed"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "installed"


def semcons(lab: Path, cwd: Path, *words: str) -> str:
    """What the command prints, in a process that finds the package."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(lab), str(ROOT)]), "COLUMNS": "300"}
    command = [sys.executable, "-m", "semcons_ray.commands.cli", *words]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(folder: Path, config: ExperimentConfig, **sections: Any) -> str:
    """A file with settings of the package over those of `config`; its path."""
    values = yaml.safe_load(dump_config(config))
    for name, section in sections.items():
        values[name] |= section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


MEASURED = {"metrics": ["rouge_l", "lab_words_off"], "metric_options": {"lab_words_off": {"most": 3}}}


def assert_words_are_counted(run: Path) -> None:
    data = pd.read_parquet(run / "data.parquet")
    references = data.loc[data["role"] == "test", "response"].tolist()
    items = pd.read_parquet(run / "items" / "round_001.parquet").dropna(subset="answer")
    by_hand = [
        min(abs(len(answer.split()) - len(references[item].split())), 3)
        for item, answer in zip(items["item"], items["answer"], strict=True)
    ]
    assert items["lab_words_off"].tolist() == by_hand
    assert set(by_hand) != {0}


def test_its_parts_are_listed(lab: Path, tmp_path: Path) -> None:
    said = semcons(lab, tmp_path, "parts", "rule")
    (line,) = [line for line in said.splitlines() if "lab_soft_medoid" in line]
    assert "semcons_ray_lab" in line
    assert "temperature=0.1" in line
    assert "Elects the answer of the highest density" in line


def test_its_rule_at_a_high_temperature_is_the_medoid_and_its_metric_counts_words(
    lab: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(num_rounds=1)
    run_experiment(config, tmp_path / "medoid", Silent())
    path = write(
        tmp_path, config, evaluation=MEASURED,
        algorithm={"rule": "lab_soft_medoid", "rule_options": {"temperature": 1000}},
    )  # fmt: skip
    said = semcons(lab, tmp_path, "run", path, "--out", "run")
    assert "words off" in said
    tables = [pd.read_parquet(tmp_path / run / "consensus/round_001.parquet") for run in ("medoid", "run")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for name in (tmp_path / "medoid" / "adapters").glob("*/adapter_model.safetensors"):
        other = tmp_path / "run" / name.relative_to(tmp_path / "medoid")
        assert name.read_bytes() == other.read_bytes()
    assert_words_are_counted(tmp_path / "run")


@pytest.mark.ray
@pytest.mark.usefixtures("one_cluster")
def test_its_algorithm_without_trimming_is_fedavg_and_runs_on_a_cluster_that_has_not_heard_of_it(
    lab: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    resources = {"fleet": "ray", "device": "cpu", "ray_address": ray.get_runtime_context().gcs_address}
    # All clients have equally many examples, so that FedAvg's weights are equal, too.
    config = tiny_config(num_rounds=2, algorithm={"name": "fedavg_lora", "weight_dtype": "float32"})
    run_experiment(config, tmp_path / "fedavg", Silent())
    algorithm = {"name": "lab_trimmed_mean", "options": {"trim": 0.3}}  # of three clients none is left out
    path = write(tmp_path, config, algorithm=algorithm, resources=resources, evaluation=MEASURED)
    semcons(lab, tmp_path, "run", path, "--out", "run")
    runs = [pd.read_parquet(tmp_path / run / "metrics.parquet") for run in ("fedavg", "run")]
    assert runs[1]["nll"].tolist() == pytest.approx(runs[0]["nll"].tolist(), rel=1e-4)
    assert runs[0]["nll"].nunique() == 3
    path = write(tmp_path, config, algorithm=algorithm, evaluation=MEASURED)
    semcons(lab, tmp_path, "run", path, "--out", "here")
    assert_same_run(tmp_path / "here", tmp_path / "run")
    assert_words_are_counted(tmp_path / "run")


@pytest.mark.ray
@pytest.mark.usefixtures("one_cluster")
def test_a_sweep_tries_its_options(lab: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(num_rounds=1)
    experiment = yaml.safe_load(dump_config(config))
    experiment["resources"]["ray_address"] = None
    values = yaml.safe_load((ROOT / "examples/semcons_ray_lab/sweep.yaml").read_text())
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"experiment": {key: experiment[key] for key in experiment if key != "name"}}))
    sweep = tmp_path / "sweep.yaml"
    values["space"]["algorithm.rule_options.temperature"]["grid"] = [0.02, 1000]
    sweep.write_text(yaml.safe_dump(values))
    said = semcons(lab, tmp_path, "sweep", str(base), str(sweep), "--out", "swept")
    assert "mean words off" in said
    trials = pd.read_parquet(tmp_path / "swept" / "trials.parquet")
    assert trials["status"].tolist() == ["finished"] * 2
    assert trials["lab_words_off"].is_monotonic_increasing
    assert set(trials["algorithm.rule_options.temperature"]) == {0.02, 1000}


def test_its_client_answers_votes_and_is_measured_beside_models(
    lab: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(num_rounds=2)
    clients = {"models": {"parrot": {"kind": "lab_parrot"}}, "mix": {config.model.name: 2, "parrot": 1}}
    path = write(tmp_path, config, clients=clients, evaluation=MEASURED)
    semcons(lab, tmp_path, "run", path, "--out", "run")
    data = pd.read_parquet(tmp_path / "run" / "data.parquet")
    heard = data[(data["role"] == "private") & (data["client_id"] == 2)]
    votes = pd.read_parquet(tmp_path / "run" / "consensus" / "round_001.parquet")
    public = data.loc[data["role"] == "public", "prompt"].tolist()
    shared = [[len({*asked.split()} & {*known.split()}) for known in heard["prompt"]] for asked in public]
    by_hand = [heard["response"].iloc[row.index(max(row))] for row in shared]
    assert votes.loc[votes["client_id"] == 2].sort_values("prompt_id")["answer"].tolist() == by_hand
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    last = metrics[metrics["round"] == 2].set_index("client_id")
    assert last["model"].tolist() == [config.model.name] * 2 + ["parrot"]
    assert last["nll"].isna().tolist() == [False, False, True]
    assert last["lab_words_off"].notna().all()
