"""What an actor's process is given: what keeps its memory from growing with its visits (see
experiments/benchmarks/many_clients), and the driver's variables, which no log is to show."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from semcons_ray.distributed.cluster import actor_options, connect, passed_on
from semcons_ray.distributed.worker import ServerActor, WorkerActor

NODE = "0" * 56
VARIABLES = (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_HOME"),
    *("HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_CACHE", "SENTENCE_TRANSFORMERS_HOME", "SEMCONS_CACHE", "XDG_CACHE_HOME"),
    *("HTTP_PROXY", "https_proxy", "All_Proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"),
    *("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "TRACKIO_DIR"),
)


def variables_of(threads: int) -> dict[str, str]:
    variables: dict[str, str] = actor_options(node_id=NODE, threads=threads, num_cpus=threads, num_gpus=0)[
        "runtime_env"
    ]["env_vars"]
    return variables


def test_every_actor_bounds_its_kernel_cache_and_gives_freed_memory_back() -> None:
    variables = variables_of(threads=2)
    assert int(variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    assert int(variables["MALLOC_TRIM_THRESHOLD_"]) > 0
    assert variables["OMP_NUM_THREADS"] == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are those of Linux's C library")
def test_memory_that_a_step_frees_is_used_by_the_next_without_the_kernel() -> None:
    code = """
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: [bytes([1]) * size for size in (200 << 10, 1 << 20, 8 << 20)]
step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **variables_of(1)}, capture_output=True, text=True, check=True)
    pages_of_a_step = (9 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) < pages_of_a_step


def test_calls_leave_no_record_at_the_head_of_the_cluster() -> None:
    assert actor_options(node_id=NODE, threads=1, num_cpus=1, num_gpus=0)["enable_task_events"] is False


def test_asking_for_options_starts_no_cluster() -> None:
    actor_options(node_id=NODE, threads=1, num_cpus=1, num_gpus=0)
    assert not ray.is_initialized()


@pytest.mark.parametrize("name", VARIABLES)
def test_where_models_data_and_trackers_are_and_how_to_get_in_is_passed_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "value")
    assert passed_on()[name] == "value"
    # Ray shows what is in there on its dashboard, and writes it to its logs.
    assert name not in actor_options(node_id=NODE, threads=1, num_cpus=1, num_gpus=0)["runtime_env"]["env_vars"]


def test_what_belongs_to_the_drivers_machine_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "PATH", "RAY_AUTH_TOKEN", "CUDA_VISIBLE_DEVICES", "MY_HF_TOKEN"):
        monkeypatch.setenv(name, "value")
        assert name not in passed_on()


@dataclass(frozen=True)
class Environment:
    """In the place of what an actor loads: raises what it finds in its environment, backwards."""

    name: str

    def build(self, *worker: str) -> None:
        raise KeyError(os.environ[self.name][::-1])


@pytest.fixture
def session() -> Iterator[Path]:
    with connect(None):
        yield Path(ray._private.worker._global_node.get_session_dir_path())


@pytest.mark.ray
@pytest.mark.slow
def test_actors_of_a_cluster_have_the_variables_and_no_log_of_ray_does(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_of_the_driver_alone"
    monkeypatch.setenv("HF_TOKEN", secret)  # after the cluster has begun, as on one that somebody else started
    options = actor_options(node_id=ray.get_runtime_context().get_node_id(), threads=1, num_cpus=0, num_gpus=0)
    for kind, further in ((WorkerActor, ("worker-0",)), (ServerActor, ())):
        actor = kind.options(**options).remote(passed_on())  # type: ignore[attr-defined]
        with pytest.raises(Exception, match=secret[::-1]):
            ray.get(actor.load.remote(Environment("HF_TOKEN"), *further))
    logs = [path for path in session.rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if secret in path.read_text(errors="replace")]
