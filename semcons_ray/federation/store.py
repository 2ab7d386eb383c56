"""Clients' states on disk: one file for each visit, written under another name and then renamed, so it is whole or
absent.

The file holds the client's state after the visit and the reply that it gave. So a visit can be asked for again
after any crash: if its file is there, the stored reply comes back and no work is repeated; if it is not, the visit
starts from the file before it. Two files are kept for each client, since the round in progress may still be repeated.

A process that sees another folder than the driver does would find no state there, and silently begin again from the
base model. So the driver puts a new mark into the folder at each start (`mark`), and each process looks for it. One
that does not find it is sent a client's files with each visit, and returns those that it wrote, which the driver puts
into the folder before it takes note of the reply: so no file system need be shared, and nothing else is changed by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, TensorSpec, serialize_file
from safetensors.torch import load
from torch import Tensor

from semcons_ray.errors import RunFolderError, writing
from semcons_ray.federation.fleet import Reply, client_folder
from semcons_ray.modeling.client_model import State

KEPT = 2

_REPLY = "reply"
_BYTES = "bytes"
"""Name in a file's metadata of the list of those tensors that stand for bytes."""


def mark(folder: Path) -> str:
    """Mark a folder that other processes are to share, by an empty file that replaces older marks; returns its name.

    The name is new each time: a network file system may serve an old copy of a file whose content has changed.

    Raises:
        StorageError: The disk is full, or cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".mark-*"):
            old.unlink(missing_ok=True)
        name = f".mark-{uuid.uuid4().hex}"
        (folder / name).touch()
    return name


Files = Mapping[str, bytes]
"""Contents of files by name."""


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder; none if it is not there."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*")) if path.is_file()}


def write_file(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it; its folder is made if need be.

    Raises:
        StorageError: The disk is full, or cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with writing(path.parent.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)  # half of a file, where the disk is full


def sees_mark(folder: Path, name: str) -> bool:
    """Whether this process sees the folder that the driver marked, and no other one or older copy."""
    return (folder / name).is_file()


def check_mark(folder: Path, name: str) -> None:
    """Check that this process sees the folder that the driver marked.

    Raises:
        RunFolderError: It sees no folder there, another folder, or an older copy.
    """
    if not sees_mark(folder, name):
        host = socket.gethostname()
        found = f"is another folder on {host} than where the run was started"
        if not folder.is_dir():
            found = f"is not there on {host}, where a worker needs it"
        raise RunFolderError(
            f"{folder} {found}; let --out lie on a file system that all machines share under the same path"
        )


class ClientStore:
    """Reads and writes the files client_NNN/round_RRR.safetensors in a folder.

    Args:
        folder: The folder of all clients' states.
        writes: Whether `save` writes. Of the processes that hold one divided model, only the first does.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes

    def reply(self, client_id: int, round: int) -> Reply | None:
        """The stored reply of a visit; None if the visit did not happen or did not finish.

        Raises:
            RunFolderError: The file is damaged.
        """
        path = self._path(client_id, round)
        if not path.is_file():
            return None
        with _reading(path) as (tensors, _):
            return msgspec.msgpack.decode(_as_bytes(tensors[_REPLY]), type=Reply)

    def is_new(self, client_id: int, *, before: int) -> bool:
        """Whether the client was never visited earlier than round `before`."""
        return all(round >= before for round in self._rounds(client_id))

    def load(self, client_id: int, *, before: int) -> dict[str, Tensor | bytes]:
        """The client's state after its last visit earlier than round `before`; empty if there was none.

        Raises:
            RunFolderError: Its file is damaged.
        """
        for round in reversed(self._rounds(client_id)):
            if round < before:
                with _reading(self._path(client_id, round)) as (tensors, texts):
                    return {
                        key: _as_bytes(value) if key in texts else value
                        for key, value in tensors.items()
                        if key != _REPLY
                    }
        return {}

    def save(self, state: State, reply: Reply) -> None:
        """Write a visit's state and reply, and remove files that are no longer needed.

        Raises:
            ValueError: The state has a name that is taken.
            StorageError: The disk is full, or cannot be written to.
        """
        if not self.writes:
            return
        path = self._path(reply.client_id, reply.round)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        if _REPLY in state:
            raise ValueError(f"a client's state has no room for a {_REPLY}: give it another name")
        tensors = {key: _as_tensor(value) if isinstance(value, bytes) else value for key, value in state.items()}
        written = [key for key, value in state.items() if isinstance(value, bytes)]
        tensors[_REPLY] = _as_tensor(msgspec.msgpack.encode(reply))
        encoded = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        # `safetensors.torch.save_file` takes three times as long over the many small tensors of an adapter.
        specs = {
            key: TensorSpec(
                dtype=str(value.dtype).removeprefix("torch."),
                shape=value.shape,
                data_ptr=value.data_ptr(),
                data_len=value.nbytes,
            )
            for key, value in encoded.items()
        }
        with writing(self.folder):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                serialize_file(specs, beside, {_BYTES: json.dumps(written)} if written else None)
                beside.rename(path)
            finally:
                beside.unlink(missing_ok=True)  # half of a file, where the disk is full
        self._drop_old(reply.client_id)

    def files(self, client_id: int) -> dict[str, bytes]:
        """The files of a client, for a process that does not see the folder."""
        return read_files(self.folder / client_folder(client_id))

    def put(self, client_id: int, files: Files) -> None:
        """Write files of a client, and remove those that are no longer needed.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        for name, content in files.items():
            write_file(self.folder / client_folder(client_id) / name, content)
        if files:
            self._drop_old(client_id)

    @contextlib.contextmanager
    def lent(self, client_id: int, files: Files) -> Iterator[dict[str, bytes]]:
        """Hold the files of a client that are kept elsewhere, in this folder and for the block; those that it changes
        are in the dict afterwards."""
        changed: dict[str, bytes] = {}
        own = self.folder / client_folder(client_id)
        self.put(client_id, files)
        try:
            yield changed
            found = read_files(own)
            changed |= {name: content for name, content in found.items() if files.get(name) != content}
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _drop_old(self, client_id: int) -> None:
        for round in self._rounds(client_id)[:-KEPT]:
            self._path(client_id, round).unlink(missing_ok=True)

    def _path(self, client_id: int, round: int) -> Path:
        return self.folder / client_folder(client_id) / f"round_{round:03d}.safetensors"

    def _rounds(self, client_id: int) -> list[int]:
        folder = self.folder / client_folder(client_id)
        try:
            names = os.listdir(folder)  # noqa: PTH208 (paths take ten times as long, three times a visit)
        except FileNotFoundError:
            return []
        return sorted(int(name[6:-12]) for name in names if name.startswith("round_"))


def _as_tensor(value: bytes) -> Tensor:
    return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    value: bytes = tensor.numpy().tobytes()
    return value


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Tensor], Sequence[str]]]:
    """The tensors of a file, and the names of those that stand for bytes.

    The file is read as a whole: opening it by `safe_open` takes three times as long for a small adapter.
    """
    try:
        content = path.read_bytes()
        tensors, header = load(content), content[8 : 8 + int.from_bytes(content[:8], "little")]
        about = json.loads(header)["__metadata__"] if b"__metadata__" in header else {}
        yield tensors, json.loads(about.get(_BYTES, "[]"))
    except (SafetensorError, OSError, msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); delete it, and resume repeats that visit") from error
