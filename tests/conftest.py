"""Shared fixtures: one tiny model of each architecture a session, and a config that uses them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes share two cores; more threads than cores are several times slower. torch reads it when imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from semcons_ray.config import ExperimentConfig, validate_config
from tests.tiny import write_data, write_model


class OneCluster(LoadScopeScheduling):
    """Of several processes one has all modules that start a Ray cluster, so that there is one cluster at a time; each
    other module is on one of them as a whole, so that its fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return "ray" if "pytest.mark.ray" in (ROOT / module).read_text(encoding="utf-8") else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneCluster:
    """Called by pytest-xdist."""
    return OneCluster(config, log)


ROOT = Path(__file__).parents[1]

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the least that vLLM has kernels for on a CPU."""
    return write_model(tmp_path_factory.mktemp("models") / "wide", "llama", width=128)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="session")
def tiny_config(tiny_llama: Path, tiny_data: Path) -> Callable[..., ExperimentConfig]:
    """Makes a config of 3 clients, 2 rounds and 6 prompts; nested settings lie over it."""

    def make(**sections: Any) -> ExperimentConfig:
        values: dict[str, Any] = {
            "num_rounds": 2,
            "data": {"source": str(tiny_data), "examples_per_client": 12, "num_test": 6},
            "prompts": {"budget": 6},
            "clients": {"num_clients": 3},
            "model": {"name": str(tiny_llama), "dtype": "float32", "max_length": 64},
            "training": {"learning_rate": 5e-3, "batch_size": 4},
            "generation": {"max_new_tokens": 8},
            "evaluation": {"num_answers": 3, "every": 1},
            "resources": {"fleet": "local", "device": "cpu"},
        }
        for name, section in sections.items():
            values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
        return validate_config(values, where="test")

    return make


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[None]:
    """A Ray cluster in which all runs of a module take place, since starting one takes longer than such a run."""
    from semcons_ray.distributed import cluster

    with cluster.connect(None):
        yield
