"""The errors this package raises.

    SemconsError                 anything this package raises on purpose
    ├── UserError                the user can mend it: one clear line, exit code 2
    │   ├── ConfigError          a setting is unknown, of the wrong type or out of range
    │   ├── DataError            a data set is missing, malformed, empty or too small
    │   ├── ModelError           a model cannot be found or loaded
    │   ├── PlacementError       the clients do not fit on the cluster
    │   └── RunFolderError       a run folder is missing, not empty, unwritable or half-written
    │       └── StorageError     its disk is full, or takes no more for another reason
    ├── MessageError             bytes that are not a message of ours
    ├── ClientError              a client failed: says which client, round and stage
    │   ├── NotFiniteError       its loss, adapter or score is not a finite number; trying again would not help
    │   └── UnansweredError      the endpoint of its model gives no answers, however often it is asked
    ├── EngineError              a generation engine broke
    └── QuorumError              too few clients answered for the round to count

Every error is built from one string, so it survives pickling through a Ray actor.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


class SemconsError(Exception):
    """Anything this package raises on purpose."""

    exit_code = 1


class UserError(SemconsError):
    """Something the user can mend; the message names the setting, file or flag to change."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """A data set is missing, malformed, empty, or too small for what is asked of it."""


class ModelError(UserError):
    """A model cannot be found or loaded."""


class PlacementError(UserError):
    """The clients do not fit on the cluster."""


class RunFolderError(UserError):
    """A run folder is missing, not empty, unwritable, or half-written."""


class StorageError(RunFolderError):
    """A disk is full, over quota or read-only, or this process has no right to write there."""


class MessageError(SemconsError):
    """Bytes that do not decode to a message of the expected kind."""


class ClientError(SemconsError):
    """A client failed; the message says which client, round and stage."""


class NotFiniteError(ClientError):
    """A number that must be finite is not: the message says which, and what setting is the likely cause."""


class UnansweredError(ClientError):
    """An endpoint gave no answer, after all retries; the message names the setting to change."""


class EngineError(SemconsError):
    """A generation engine broke, or could not take a request."""


class QuorumError(SemconsError):
    """Too few clients answered for the round to count."""


_STORAGE = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EROFS: "the file system is read-only; make it writable",
    errno.EACCES: "permission denied; make it writable",
    errno.EPERM: "it is not permitted; make it writable",
}


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say it in one line where a folder can't be written to, which no retry mends.

    Rust's and Arrow's errors, unlike Python's, carry the system's only in their text.

    Raises:
        StorageError: The disk is full, over quota or read-only, or this process has no right to write there.
    """
    try:
        yield
    except SemconsError:
        raise
    except Exception as error:
        for number, trouble in _STORAGE.items():
            if os.strerror(number) in str(error):
                goes_on = "semcons resume goes on (compare and sweep: the same command)"
                raise StorageError(f"cannot write {folder}: {trouble}, and {goes_on}") from error
        raise


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: its first, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
