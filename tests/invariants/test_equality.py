"""The same config and seed give the same numbers, whatever the fleet and the packing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.distributed import cluster
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.real, pytest.mark.usefixtures("four_cores")]

MakeConfig = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def four_cores() -> Iterator[None]:
    """A cluster that takes this machine to have a core for each of four clients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "usable_cpus", lambda: 4)
        with cluster.connect(None):
            yield


def run(config: ExperimentConfig, out: Path, **resources: object) -> str:
    changed = {**config.model_dump(), "resources": {**config.resources.model_dump(), **resources}}
    observer = Silent()
    run_experiment(validate_config(changed, where="test"), out, observer)
    return observer.plan


@pytest.mark.parametrize(
    ("sections", "architectures"),
    [
        (
            {
                "clients": {"num_clients": 4, "participation": 0.75},
                "data": {"client_test_fraction": 0.25},
                "algorithm": {"rule": "random_client", "agreement_threshold": 0.3},
                "training": {"keep_optimizer": True},
                "generation": {"temperature": 1.0, "num_samples": 2},
                "model": {"lora": {"dropout": 0.2}},
            },
            2,
        ),
        (
            {
                "clients": {"num_clients": 4, "participation": 0.75},
                "algorithm": {"name": "scaffold", "self_labels": True},
            },
            1,
        ),
        ({"clients": {"num_clients": 4, "participation": 0.75}, "algorithm": {"name": "fedadam"}}, 1),
    ],
    ids=[
        "everything that draws random numbers, mixed architectures",
        "weights and what clients remember",
        "a server that knows from what clients start",
    ],
)
def test_local_fleet_one_actor_a_client_and_packed_actors_agree_to_the_last_bit(
    tiny_config: MakeConfig,
    tiny_llama: Path,
    tiny_qwen: Path,
    tmp_path: Path,
    sections: dict[str, Any],
    architectures: int,
) -> None:
    mix = {str(model): 1 for model in (tiny_llama, tiny_qwen)} if architectures > 1 else {}
    config = tiny_config(**{**sections, "clients": {**sections["clients"], "mix": mix}})
    assert f"4 clients on {architectures} workers" in run(config, tmp_path / "local", fleet="local")
    # Where anything can differ, actors of a client and of several; else actors of two, which are both.
    for most in (4, 2) if architectures > 1 else (2,):
        assert f"4 clients on {most} workers" in run(config, tmp_path / str(most), fleet="ray", max_workers=most)
        assert_same_run(tmp_path / "local", tmp_path / str(most))


@pytest.mark.long
def test_smollm2_agrees_too(tmp_path: Path) -> None:
    config = validate_config(
        {
            "num_rounds": 2,
            "data": {"examples_per_client": 4, "num_test": 2},
            "prompts": {"budget": 3},
            "clients": {"num_clients": 2},
            "generation": {"max_new_tokens": 8},
            "evaluation": {"num_answers": 2},
            "resources": {"device": "cpu"},
        },
        where="test",
    )
    assert "2 clients on 1 workers" in run(config, tmp_path / "local", fleet="local")
    assert "2 clients on 2 workers" in run(config, tmp_path / "own", fleet="ray")
    assert_same_run(tmp_path / "local", tmp_path / "own")


def test_a_seed_changes_everything(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config(), tmp_path / "zero", fleet="local")
    run(tiny_config(seed=1), tmp_path / "one", fleet="local")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "zero", tmp_path / "one")
