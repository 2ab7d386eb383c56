"""What keeps an actor's memory from growing with its visits: see experiments/benchmarks/many_clients."""

import pytest
import ray

from semcons_ray.distributed.cluster import actor_options


def test_every_actor_bounds_its_kernel_cache_and_gives_freed_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMCONS_CACHE", "/cache")
    options = actor_options(node_id="0" * 56, threads=2, num_cpus=2, num_gpus=0)
    variables = options["runtime_env"]["env_vars"]
    assert int(variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    assert int(variables["MALLOC_TRIM_THRESHOLD_"]) > 0
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["SEMCONS_CACHE"] == "/cache"


def test_calls_leave_no_record_at_the_head_of_the_cluster() -> None:
    assert actor_options(node_id="0" * 56, threads=1, num_cpus=1, num_gpus=0)["enable_task_events"] is False


def test_asking_for_options_starts_no_cluster() -> None:
    actor_options(node_id="0" * 56, threads=1, num_cpus=1, num_gpus=0)
    assert not ray.is_initialized()
