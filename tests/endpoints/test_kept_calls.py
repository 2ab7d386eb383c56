import subprocess
import sys
from pathlib import Path

import pytest

from semcons_ray.endpoints import kept_calls
from semcons_ray.endpoints.kept_calls import Call, Job, KeptCalls, LeftOut
from semcons_ray.errors import RunFolderError, StorageError

CALL = Call(key="a", task="client 0", answer="zwölf\u2028\r\n", finish="stop", input_tokens=1, output_tokens=2, usd=0.5)
HOLD = """
import sys, time
from pathlib import Path
from semcons_ray.endpoints.kept_calls import Call, KeptCalls
KeptCalls(Path(sys.argv[1])).all(Call)
print("held", flush=True)
time.sleep(60)
"""


def test_lines_are_read_back_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    kept = KeptCalls(path)
    for line in (CALL, Job(key="a", id="j"), Job(key="a", id="j", model="m"), LeftOut(parameter="seed")):
        kept.add(line)
    for one in (kept, KeptCalls(path)):
        assert one.all(Call) == [CALL]
        assert one.get(Job, "a") == Job(key="a", id="j", model="m")
        assert one.get(LeftOut, "seed")
        assert one.get(LeftOut, "stop") is None
        assert one.get(Call, "b") is None


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calls.jsonl"
    kept = KeptCalls(path)
    kept.add(CALL)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_calls.os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        kept.add(LeftOut(parameter="seed"))
    assert path.read_bytes() == before


def test_a_process_that_takes_over_waits_until_the_one_before_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calls.jsonl"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    before = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env=environment)
    assert before.stdout is not None
    assert before.stdout.readline() == b"held\n"
    with monkeypatch.context() as patch:
        patch.setattr(kept_calls, "PATIENCE_SECONDS", 0.2)
        with pytest.raises(RunFolderError, match="in use by another process"):
            KeptCalls(path).all(Call)
    before.kill()
    before.wait()
    assert KeptCalls(path).all(Call) == []
    before.stdout.close()
