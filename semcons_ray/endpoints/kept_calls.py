"""Calls that were answered, in a file that outlives the process: a line for each, so that none is paid for twice.

A process that uses the file holds a lock beside it as long as it lives. So one that takes over from another, which the
driver's end may leave alive for a moment, knows all that was asked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from semcons_ray.errors import RunFolderError, writing


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """A request that was answered.

    Attributes:
        key: Digest of what was asked, and for which task.
        task: For what it was first asked, in words: whose answers in which round.
        answer: The answer; empty if there is none in the reply.
        finish: Why it ended, as the endpoint has it: stop, length, content_filter, refusal.
        input_tokens: Tokens read.
        output_tokens: Tokens written.
        usd: Price in US dollars.
    """

    key: str
    task: str
    answer: str
    finish: str
    input_tokens: int
    output_tokens: int
    usd: float

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.input_tokens + self.output_tokens


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job"):
    """A fine-tuning job that was started, and what became of it.

    Attributes:
        key: Digest of what it learns, and from which model on.
        id: Its name at the provider.
        model: The model that came of it; empty while it is not done.
        tokens: Tokens trained on.
        usd: Price in US dollars.
    """

    key: str
    id: str
    model: str = ""
    tokens: int = 0
    usd: float = 0.0


class LeftOut(msgspec.Struct, frozen=True, kw_only=True, tag="left_out"):
    """A parameter that the endpoint does not take."""

    parameter: str


Line = TypeVar("Line", Call, Job, LeftOut)

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Call | Job | LeftOut)


class KeptCalls:
    """The lines of a JSONL file, the last of each key. It may be used by several threads.

    Args:
        path: The file, which is read when it is first needed, and made when there is something to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lines: dict[tuple[type, str], Call | Job | LeftOut] | None = None

    def get(self, kind: type[Line], key: str) -> Line | None:
        """The line of that kind with that key.

        Raises:
            RunFolderError: The file is damaged, or another process uses it.
        """
        return self._read().get((kind, key))  # type: ignore[return-value]

    def all(self, kind: type[Line]) -> list[Line]:
        """All lines of a kind."""
        return [line for line in [*self._read().values()] if isinstance(line, kind)]

    def add(self, line: Call | Job | LeftOut) -> None:
        """Append a line; when this returns, it is on the disk.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        lines = self._read()
        with self._lock, writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    file.write(_ENCODER.encode(line) + b"\n")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)  # half of a line, where the disk is full
                    raise
            lines[_place(line)] = line

    def _read(self) -> dict[tuple[type, str], Call | Job | LeftOut]:
        with self._lock:
            if self._lines is None:
                _hold(self.path.with_name("calls.lock"))
                whole = self.path.read_bytes() if self.path.is_file() else b""
                end = whole.rfind(b"\n") + 1
                if end < len(whole):  # a process was killed while it wrote
                    os.truncate(self.path, end)
                try:
                    lines = [_DECODER.decode(line) for line in whole[:end].splitlines()]
                except msgspec.MsgspecError as error:
                    raise RunFolderError(f"{self.path} is damaged ({error}); delete the line") from error
                self._lines = {_place(line): line for line in lines}
            return self._lines


def _place(line: Call | Job | LeftOut) -> tuple[type, str]:
    return type(line), line.parameter if isinstance(line, LeftOut) else line.key


PATIENCE_SECONDS = 60.0
"""How long to wait for a process that uses the file to end."""

_HELD: dict[Path, IO[bytes]] = {}


def _hold(path: Path) -> None:
    """Lock a file for this process until it ends: a lock that any part of it may take again, and others may not.

    Raises:
        RunFolderError: Another process does not let go of it.
    """
    path = path.absolute()
    if path in _HELD:
        return
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                break  # a file system without locks
        if time.monotonic() > until:
            raise RunFolderError(f"{path.parent} is in use by another process; end it, and resume")
        time.sleep(0.1)
    _HELD[path] = file  # closing it would end the lock
