from collections.abc import Iterator

import pytest
import torch

from semcons_ray.metering.gpus import Gpu


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has GPU-0, for a process that uses a GPU."""
    gpu = Gpu("GPU-0", "GPU-0", "a GPU", 80.0, "9.0", True, 700.0)
    monkeypatch.setattr("semcons_ray.metering.gpus.visible_gpus", lambda: [gpu])


@pytest.fixture
def own_threads() -> Iterator[None]:
    """The number of torch's threads that a test sets is its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
