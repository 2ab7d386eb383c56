import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import write_model


@pytest.fixture(autouse=True)
def little_is_left() -> Iterator[None]:
    """No test finds the memory of another."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def large_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 million weights."""
    return write_model(
        tmp_path_factory.mktemp("models") / "large", width=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip


@pytest.fixture
def one_gibibyte() -> Iterator[None]:
    """As if the GPU had no more."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((1 << 30) / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
