import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from semcons_ray.distributed import cluster
from semcons_ray.distributed.ray_server import RayServer
from semcons_ray.errors import MessageError, ModelError, SemconsError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class FakeServerSpec:
    """A server that says what it heard; `trouble` comes at each of the first `times` calls of conclude."""

    folder: Path
    trouble: str = ""
    times: int = 1
    threads: int = 1

    def build(self) -> "FakeServer":
        if self.trouble == "no model":
            raise ModelError("cannot load server.embedding_model nothing")
        return FakeServer(self)


class FakeServer:
    def __init__(self, spec: FakeServerSpec) -> None:
        self.spec = spec
        self.heard: list[str] = []

    def begin(self, round: int, client_ids: Sequence[int], kept: bytes = b"") -> None:
        self.heard.append(f"begin {round} {client_ids}")

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None = None) -> None:
        if uplink == b"nonsense":
            raise MessageError("Answers: nonsense")
        self.heard.append(uplink.decode())

    def conclude(self) -> list[str]:
        attempts = len(list(self.spec.folder.iterdir()))
        (self.spec.folder / str(attempts)).touch()
        if attempts < self.spec.times:
            if self.spec.trouble == "die":
                os._exit(1)
            if self.spec.trouble == "hang":
                time.sleep(3600)
        return self.heard


MakeServer = Callable[..., RayServer]


@pytest.fixture(scope="module")
def node_id() -> Iterator[str]:
    with cluster.connect(None):
        yield cluster.list_nodes()[0].node_id


@pytest.fixture
def make_server(node_id: str, tmp_path: Path) -> Iterator[MakeServer]:
    made: list[RayServer] = []

    def make(timeout: float = 60.0, **trouble: object) -> RayServer:
        spec = FakeServerSpec(tmp_path, **trouble)  # type: ignore[arg-type]
        made.append(RayServer(spec, node_id=node_id, gpus=0.0, timeout_seconds=timeout, max_restarts=1))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for server in made:
        server.close()


def verdict(server: RayServer) -> object:
    server.begin(1, [0, 1])
    server.collect(0, b"one")
    server.collect(1, b"two")
    return server.conclude()


@pytest.mark.parametrize("trouble", ["", "die", "hang"])
def test_a_server_that_dies_or_hangs_hears_everything_again(make_server: MakeServer, trouble: str) -> None:
    server = make_server(trouble=trouble, timeout=20.0)
    assert verdict(server) == ["begin 1 (0, 1)", "one", "two"]


def test_one_killed_between_calls_does_too(make_server: MakeServer) -> None:
    server = make_server()
    server.begin(1, [0])
    server.collect(0, b"one")
    ray.kill(server._actor)
    server.collect(1, b"two")
    assert server.conclude() == ["begin 1 (0,)", "one", "two"]


def test_a_round_that_is_over_is_not_told_again(make_server: MakeServer) -> None:
    server = make_server()
    verdict(server)
    ray.kill(server._actor)
    server.begin(2, [5])
    assert server.conclude() == ["begin 2 (5,)"]


def test_one_that_keeps_dying_ends_the_run(make_server: MakeServer) -> None:
    with pytest.raises(SemconsError, match="the server died 2 times in conclude"):
        verdict(make_server(trouble="die", times=9))


def test_errors_of_the_server_come_out_as_they_are(make_server: MakeServer) -> None:
    with pytest.raises(ModelError, match=r"^cannot load server\.embedding_model nothing$"):
        verdict(make_server(trouble="no model"))
    server = make_server()
    server.begin(1, [0])
    server.collect(0, b"nonsense")
    with pytest.raises(MessageError, match="nonsense"):
        server.conclude()
