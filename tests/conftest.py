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

from semcons_ray.config import ExperimentConfig, validate_config
from tests.hub import Hub, serving
from tests.tiny import write_data, write_embedder, write_model

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
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_embedder(tmp_path_factory.mktemp("models") / "embedder", width=32)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="session")
def tiniest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer: half the time of one with two, where a run only has to have a model."""
    return write_model(tmp_path_factory.mktemp("models") / "tiniest", "llama", num_hidden_layers=1)


@pytest.fixture(scope="session")
def tiny_config(tiniest: Path, tiny_data: Path, tiny_embedder: str) -> Callable[..., ExperimentConfig]:
    """Makes a config of 3 clients, 2 rounds and 6 prompts; nested settings lie over it."""

    def make(**sections: Any) -> ExperimentConfig:
        values: dict[str, Any] = {
            "num_rounds": 2,
            "data": {"source": str(tiny_data), "examples_per_client": 12, "num_test": 6},
            "prompts": {"budget": 6},
            "clients": {"num_clients": 3},
            "model": {"name": str(tiniest), "dtype": "float32", "max_length": 64},
            "training": {"learning_rate": 5e-3, "batch_size": 4},
            "generation": {"max_new_tokens": 8, "engine": "transformers"},
            "server": {} if "embedder" in sections.get("server", {}) else {"embedding_model": tiny_embedder},
            "evaluation": {"num_answers": 3, "every": 1},
            "resources": {"fleet": "local", "device": "cpu"},
        }
        for name, section in sections.items():
            values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
        return validate_config(values, where="test")

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model hub on this machine, which takes the place of the real one, with caches of its own."""
    import datasets
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[None]:
    """A Ray cluster in which all runs of a module take place, since starting one takes longer than such a run."""
    from semcons_ray.distributed import cluster

    with cluster.connect(None):
        yield
