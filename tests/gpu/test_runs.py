"""Whole runs on a GPU: the same bits again and after a stop, joules of its counter, one line where memory is short."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.metering.gpus import visible_gpus
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.gpu import NEEDS_GPU
from tests.invariants.runs import Silent, assert_same_run
from tests.modeling.test_embedding_kinds import write_bert

pytestmark = NEEDS_GPU

Make = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def make(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a config of a run on a GPU, clients and server, with an embedding model of its own."""
    embedder = write_bert(tmp_path_factory.mktemp("embedder"), positions=64)

    def on_gpu(**sections: dict[str, object]) -> ExperimentConfig:
        resources = {"device": "cuda", "gpus_per_worker": 0.5, "server_gpus": 0.5, **sections.pop("resources", {})}
        return tiny_config(server={"embedding_model": embedder}, resources=resources, **sections)

    return on_gpu


@pytest.fixture(scope="module")
def finished(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_experiment(make(generation={"temperature": 1.0}), out, Silent())
    return out


def test_a_run_gives_the_same_bits_again(make: Make, finished: Path, tmp_path: Path) -> None:
    run_experiment(make(generation={"temperature": 1.0}), tmp_path / "run", Silent())
    assert_same_run(finished, tmp_path / "run")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(finished, stopped)
    for path in [*stopped.glob("state/round_002*"), *stopped.glob("state/client_*/round_002*")]:
        path.unlink()
    resume_experiment(stopped, Silent())
    assert_same_run(finished, stopped)


def test_joules_are_those_of_the_counter(finished: Path) -> None:
    rows = pd.read_parquet(finished / "ledger.parquet")
    on_gpu = rows[rows.gpus != ""]
    (gpu,) = visible_gpus()[:1]
    assert set(on_gpu.gpus) == {gpu.card}
    assert {"fine_tune", "generate", "evaluate", "embed"} <= set(on_gpu.stage)
    measured = on_gpu[on_gpu.energy_source == "measured"]
    assert set(measured.stage) >= {"fine_tune", "generate"}
    assert gpu.power_limit_watts is not None
    seconds = (rows.started_at + rows.duration_seconds).max() - rows.started_at.min()
    assert 0 < measured.energy_joules.sum() <= 1.1 * gpu.power_limit_watts * seconds


@pytest.mark.parametrize("name", ["fedprox", "scaffold"])
def test_what_changes_gradients_works_where_they_are(name: str, make: Make, tmp_path: Path) -> None:
    config = make(algorithm={"name": name})
    for out in ("one", "other"):
        run_experiment(config, tmp_path / out, Silent())
    assert_same_run(tmp_path / "one", tmp_path / "other")


@pytest.mark.ray
def test_clients_alone_and_packed_agree_to_the_last_bit(make: Make, finished: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        resources = {"fleet": "ray", "gpus_per_worker": 0.25, "server_gpus": 0.25, "max_workers": workers}
        run_experiment(make(generation={"temperature": 1.0}, resources=resources), tmp_path / f"{workers}", Silent())
        assert_same_run(finished, tmp_path / f"{workers}")


@pytest.mark.usefixtures("one_gibibyte")
def test_where_memory_is_short_a_run_ends_with_one_line(
    make: Make, large_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(
        model={"name": str(large_llama)}, training={"batch_size": 1000}, data={"examples_per_client": 130},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert main(["run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not enough memory to train" in error
    for setting in ("training.batch_size 1000", "model.max_length", "training.gradient_checkpointing"):
        assert setting in error
