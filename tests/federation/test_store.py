import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from semcons_ray.errors import RunFolderError, StorageError
from semcons_ray.federation.fleet import Evaluation, Reply
from semcons_ray.federation.store import ClientStore, check_mark, mark
from semcons_ray.metering.ledger import LedgerRow

EVALUATION = Evaluation(
    nll=(1.5, 0.25), num_tokens=(4, 1), num_bytes=(9, 2), answers=("a", "ü"), option_nll=((0.5, 1.5), ())
)


def reply(round: int, client_id: int = 0) -> Reply:
    row = LedgerRow(
        round=round, client_id=client_id, worker="w", node="n", stage="generate", started_at=1.0, duration_seconds=0.5
    )
    return Reply(
        client_id=client_id,
        round=round,
        uplink=b"\x00\xff" * round,
        train_loss=0.25,
        num_private=3,
        num_pseudo_labels=2,
        evaluation=EVALUATION,
        rows=(row,),
    )


def test_a_visit_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    tensors = {"adapter.a": torch.arange(6.0).view(2, 3), "optimizer.0.step": torch.tensor(7.0)}
    store.save(tensors, reply(1))
    saved = ClientStore(tmp_path).reply(0, 1)
    assert saved is not None
    assert saved.uplink == b"\x00\xff"
    assert saved.evaluation == EVALUATION
    assert saved.rows[0].stage == "generate"
    loaded = store.load(0, before=2)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_a_repeated_visit_starts_from_the_state_before_it(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for round in (1, 2):
        store.save({"x": torch.tensor(float(round))}, reply(round))
    assert float(store.load(0, before=2)["x"]) == 1.0
    assert float(store.load(0, before=3)["x"]) == 2.0
    assert store.load(0, before=1) == {}
    assert store.load(5, before=9) == {}
    assert store.reply(0, 3) is None


def test_old_visits_are_dropped(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "not" / "there" / "yet")
    for round in range(95, 102):
        store.save({"x": torch.tensor(float(round))}, reply(round))
    assert sorted(path.name for path in (store.folder / "client_000").iterdir()) == [
        "round_100.safetensors",
        "round_101.safetensors",
    ]
    assert float(store.load(0, before=101)["x"]) == 100.0


def test_of_several_processes_that_are_one_client_one_writes(tmp_path: Path) -> None:
    ClientStore(tmp_path, writes=False).save({"x": torch.zeros(1)}, reply(1))
    assert not any(tmp_path.iterdir())


def test_clients_are_kept_apart(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save({"x": torch.zeros(1)}, reply(1, client_id=0))
    assert store.reply(1, 1) is None


def whole(path: Path) -> bytes:
    store = ClientStore(path)
    store.save({"x": torch.zeros(1)}, reply(1))
    return (path / "client_000" / "round_001.safetensors").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"half",
        lambda data: data[:-1],
        lambda data: data.replace(b"num_tokens", b"nul_tokens"),
        lambda data: data.replace(b"\xc3\xbc", b"\xff\xff"),
        lambda data: save({"x": torch.zeros(1)}),
    ],
    ids=["another file", "cut short", "a field lost", "not UTF-8", "without a reply"],
)
def test_a_damaged_file_says_what_to_do(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "client_000" / "round_001.safetensors").write_bytes(damage(whole(tmp_path)))
    store = ClientStore(tmp_path)
    says = r"client_000/round_001.safetensors is damaged \(.*\); delete it, and resume repeats that visit"
    with pytest.raises(RunFolderError, match=says):
        store.reply(0, 1)


def test_a_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "client_000" / "round_001.safetensors").write_bytes(whole(tmp_path)[:-1])
    with pytest.raises(RunFolderError, match="delete it, and resume repeats that visit"):
        ClientStore(tmp_path).load(0, before=2)


def test_a_folder_is_known_by_the_mark_that_the_driver_put_there_last(tmp_path: Path) -> None:
    shared, host = tmp_path / "not" / "there" / "yet", re.escape(socket.gethostname())
    away = "; let --out lie on a file system that all machines share under the same path$"
    another, absent = (f"^{{}} is {what}{away}" for what in (
        f"another folder on {host} than where the run was started", f"not there on {host}, where a worker needs it",
    ))  # fmt: skip
    older = mark(shared)
    shutil.copytree(shared, tmp_path / "copy")
    name = mark(shared)
    check_mark(shared, name)
    with pytest.raises(RunFolderError, match=another.format(shared)):
        check_mark(shared, older)
    with pytest.raises(RunFolderError, match=another.format(tmp_path / "copy")):
        check_mark(tmp_path / "copy", name)
    with pytest.raises(RunFolderError, match=absent.format(tmp_path / "nowhere")):
        check_mark(tmp_path / "nowhere", name)
    assert [path.name for path in shared.iterdir()] == [name]


def test_a_visit_that_a_full_disk_has_no_room_for_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_the_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("semcons_ray.federation.store.serialize_file", fills_the_disk)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}: the disk is full"):
        ClientStore(tmp_path).save({"x": torch.zeros(1)}, reply(1))
    assert not list(tmp_path.rglob("*round*"))


def test_a_state_of_any_types_is_read_as_it_was_and_by_safetensors_too(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    state = {"turned": turned, "scalar": torch.tensor(3), "none": torch.empty(0, 4), "text": b"__metadata__"}
    state |= {str(kind): torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.float64, torch.bool)}
    store = ClientStore(tmp_path)
    store.save(state, reply(1))
    (path,) = tmp_path.rglob("round_*")
    by_safetensors = load_file(path)
    kept = store.load(0, before=2)
    assert kept.pop("text") == state.pop("text") == by_safetensors.pop("text").numpy().tobytes()
    assert kept.keys() == state.keys() == by_safetensors.keys() - {"reply"}
    for key, value in state.items():
        assert kept[key].dtype == by_safetensors[key].dtype == value.dtype
        assert torch.equal(kept[key], value)
        assert torch.equal(by_safetensors[key], value)


def test_a_folder_that_cannot_be_marked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError("[Errno 28] No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(StorageError, match=f"^cannot write {tmp_path}: the disk is full"):
        mark(tmp_path)
