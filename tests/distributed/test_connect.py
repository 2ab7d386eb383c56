"""A cluster of one's own, or one to join: each that cannot be had is told of in one line that says what to change."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from semcons_ray.distributed.cluster import connect
from semcons_ray.errors import PlacementError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRIVER = """
import signal, sys
from semcons_ray.distributed.cluster import connect
from semcons_ray.errors import PlacementError

def handler(*_): pass

signal.signal(signal.SIGTERM, handler)
try:
    with connect(sys.argv[1] or None):
        import ray
        assert signal.getsignal(signal.SIGTERM) is handler
        print(ray.get(ray.remote(lambda: "worked").remote()))
    assert signal.getsignal(signal.SIGTERM) is handler
except PlacementError as error:
    sys.exit(str(error))
"""
HEAD = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
TOKEN = "a" * 64


def driver(address: str = "", *, before: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """A process that joins the cluster, or starts one, and runs something there; `before` is code that is run first."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", before + DRIVER, address],
        env={**inherited, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "/proc/nowhere"},
        {"HOME": "{}"},
        {"HOME": "{}", "RAY_AUTH_MODE": "token"},
        {"HOME": "/proc/nowhere", "RAY_AUTH_MODE": "disabled"},
        {"HOME": "/proc/nowhere", "RAY_AUTH_TOKEN": TOKEN},
    ],
    ids=["a HOME that is not there", "an empty HOME", "mode token", "mode disabled", "a token"],
)
def test_a_cluster_of_ones_own_needs_nothing_of_home(environment: dict[str, str], tmp_path: Path) -> None:
    done = driver(**{name: value.format(tmp_path) for name, value in environment.items()})
    assert done.stdout == "worked\n", done.stderr
    assert not list(tmp_path.iterdir())  # a token that is left there would be asked for by whatever Ray starts next


def test_a_token_of_an_earlier_home_is_not_counted_on(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(TOKEN)
    before = """
import os
from ray._raylet import AuthenticationTokenLoader
assert AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
os.environ["HOME"] = "/proc/nowhere"
"""
    done = driver(before=before, HOME=str(tmp_path))
    assert done.stdout == "worked\n", done.stderr


@pytest.mark.long
@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token", "a token at HOME"])
@pytest.mark.parametrize("first", ["connect(None)", "connect('127.0.0.1:1')"], ids=["after one here", "after none"])
def test_a_cluster_that_the_caller_starts_afterwards_is_as_without(
    first: str, token: str | None, tmp_path: Path
) -> None:
    if token is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    before = f"""
import contextlib, os
import ray
from ray.cluster_utils import Cluster
from semcons_ray.distributed.cluster import connect
from semcons_ray.errors import PlacementError

variables = dict(os.environ)
with contextlib.suppress(PlacementError), {first}:
    pass
assert os.environ == variables
cluster = Cluster()
cluster.add_node(num_cpus=1, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote
class Actor:
    def answer(self):
        return "answered"

print(ray.get(Actor.remote().answer.remote()))
ray.shutdown()
cluster.shutdown()
"""
    done = driver(before=before, HOME=str(tmp_path))
    assert done.stdout == "answered\nworked\n", done.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TMPDIR": f"/tmp/{'long' * 25}"}, "longlong is too long a path for its sockets; set RAY_TMPDIR to a short"),
        ({"RAY_TMPDIR": f"/tmp/{'long' * 25}"}, "set RAY_TMPDIR to a short one, such as /tmp"),
        ({"RAY_TMPDIR": "/proc/nowhere"}, "(RAY_TMPDIR says where it keeps its files, now /proc/nowhere)"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "file cannot be opened or is empty: /nowhere"),
    ],
)
def test_a_cluster_that_cannot_be_started_says_why(environment: dict[str, str], says: str) -> None:
    done = driver(**environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cannot start Ray on this machine: ")
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """Address of a cluster that wants a token."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-c", HEAD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as head:  # type: ignore[call-overload]
        yield head.stdout.readline().strip()
        head.stdin.close()


def test_a_cluster_is_joined_with_its_token(guarded: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    for token in ({"RAY_AUTH_TOKEN": TOKEN}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        done = driver(guarded, RAY_AUTH_MODE="token", **token)
        assert done.stdout == "worked\n", done.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}, "Authentication token is missing or incorrect"),
        ({"RAY_AUTH_TOKEN": TOKEN}, "Authentication token is missing or incorrect"),
        ({"RAY_AUTH_MODE": "token"}, "no authentication token was found"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "file cannot be opened or is empty: /nowhere"),
    ],
    ids=["a wrong token", "a token that is not shown", "no token", "no file of a token"],
)
def test_a_token_that_a_cluster_wants_is_asked_for_at_once(
    environment: dict[str, str], says: str, guarded: str, tmp_path: Path
) -> None:
    done = driver(guarded, HOME=str(tmp_path), **environment)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"cannot join a Ray cluster at resources.ray_address {guarded}: ")
    assert says in line
    assert "RAY_AUTH_TOKEN_PATH names or in ~/.ray/auth_token; and RAY_AUTH_MODE=token has it shown" in line
    assert "Traceback" not in done.stderr


def test_nobody_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PlacementError, match=rf"127\.0\.0\.1:{port}: \[Errno 111\] Connection refused"), connect(
        f"127.0.0.1:{port}"
    ):
        pass
    assert not ray.is_initialized()
