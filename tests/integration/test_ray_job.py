"""The driver as a Ray job, by the commands that cluster/README.md gives, on a head that wants a token."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent, assert_same_run

pytestmark = [pytest.mark.ray, pytest.mark.nodes, pytest.mark.slow, pytest.mark.real]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(held.getsockname()[1]) for held in sockets]
    for held in sockets:
        held.close()
    return ports


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """Address of its dashboard, and the environment of who has its token."""
    port, dashboard, agent, client = free_ports(4)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    options = ["--port", port, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    options += ["--ray-client-server-port", client, "--num-cpus", "2", "--object-store-memory", str(100 << 20)]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # sockets want short paths
        command = [*RAY, "start", "--head", "--block", "--temp-dir", folder, *options]
        process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
        yield f"http://127.0.0.1:{dashboard}", env
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ray_job(*words: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*RAY, "job", *words], env=env, capture_output=True, text=True, check=False, timeout=240)


def test_a_submitted_driver_runs_with_the_token_and_is_refused_without(
    head: tuple[str, dict[str, str]], tiny_config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    address, env = head
    resources = {"fleet": "ray", "ray_address": "auto", "max_workers": 1}
    config = tiny_config(num_rounds=1, clients={"num_clients": 2}, resources=resources)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    deadline = time.monotonic() + 120
    while ray_job("list", "--address", address, env=env).returncode:
        assert time.monotonic() < deadline
        time.sleep(1)
    wrong = ray_job("list", "--address", address, env={**env, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    assert wrong.returncode != 0
    assert "token" in wrong.stderr
    driver = [sys.executable, "-m", "semcons_ray.commands.cli", "run", str(tmp_path / "config.yaml")]
    done = ray_job("submit", "--address", address, "--", *driver, "--out", str(tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout
    run_experiment(tiny_config(num_rounds=1, clients={"num_clients": 2}), tmp_path / "here", Silent())
    assert_same_run(tmp_path / "here", tmp_path / "run")
