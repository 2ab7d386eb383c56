"""What a worker returns, without Ray around it."""

from pathlib import Path
from typing import Any

import msgspec

from semcons_ray.distributed.worker import Answer, WorkerActor
from semcons_ray.tracking.run_log import LogAfar
from tests.distributed.fakes import FakeSpec


def test_what_a_worker_without_the_folder_logs_comes_with_each_answer(tmp_path: Path) -> None:
    kind: Any = WorkerActor
    worker = kind.__ray_metadata__.modified_class.__new__(kind.__ray_metadata__.modified_class)
    worker._host, worker._log = FakeSpec(tmp_path).build("worker-0"), LogAfar()
    worker._log.add("visits\n")
    visited = Answer.decode(worker.visit(1, 2, b"hello ", False, {}))
    assert (visited.log, visited.files) == ("visits\n", {"round_000.safetensors": b"x"})
    assert msgspec.msgpack.decode(visited.reply)["uplink"] == b"hello 1"
    worker._log.add("exports\n")
    exported = Answer.decode(worker.export_adapter(1, 3, b"one", tmp_path / "not seen", {}))
    assert (exported.log, exported.files) == ("exports\n", {"who": b"1 3 one"})
