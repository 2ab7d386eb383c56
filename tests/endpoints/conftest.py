import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from semcons_ray.config import EndpointConfig
from semcons_ray.endpoints.endpoint import Endpoint, Request
from semcons_ray.messages import Turn
from semcons_ray.modeling.packaged import resolve_model
from tests.endpoints.proxy import Fault, Proxy
from tests.endpoints.server import MODEL, Server, serving

KEY = "sk-test-0a1b2c3d4e5f6g7h8i9j"
VARIABLE = "SEMCONS_TEST_KEY"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return KEY


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server(key=KEY)) as server:
        yield server


@pytest.fixture
def proxied(server: Server) -> Iterator[Callable[[Mapping[int, Fault] | Callable[[int, bytes], Fault | None]], Proxy]]:
    """Puts a proxy with faults in front of the server."""
    with ExitStack() as stack:
        yield lambda faults: stack.enter_context(serving(Proxy(server.url, faults)))


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Callable[..., Endpoint]]:
    """Makes an endpoint at an address, whose calls are kept in tmp_path/calls."""
    made: list[Endpoint] = []

    def make(url: str, **options: Any) -> Endpoint:
        values = {"model": MODEL, "base_url": url, "api_key_env": VARIABLE, "timeout_seconds": 5.0} | options
        made.append(Endpoint(EndpointConfig(**values), tmp_path / "calls", "clients.models.closed.options"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def requests(count: int, **others: Any) -> list[Request]:
    """Different questions."""
    return [
        Request(task=f"prompt {number}", turns=(Turn("user", f"question {number}"),), max_tokens=8, **others)
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def real_server() -> Iterator[tuple[str, str]]:
    """A real server of a real model: its address, and the model's name there."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    folder = resolve_model("packaged:smollm2-135m-instruct")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        until = time.monotonic() + 180
        while time.monotonic() < until:
            assert process.poll() is None, "the server has stopped"
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.kill()
        process.wait()
