"""run.log: what all processes of a run log, in one file of its folder.

Each process appends its own lines, under a lock, and closes the file again: so nothing is lost with a process that is
killed, and lines of several machines are whole. Workers get the file's name in an environment variable.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "SEMCONS_RUN_LOG"
_PACKAGE = __name__.partition(".")[0]


class _Appending(logging.Handler):
    """Appends records to a file that other processes append to as well."""

    def __init__(self, path: Path, process: str) -> None:
        super().__init__()
        self._path = path
        place = f"{process}@{socket.gethostname()}".replace("%", "%%")
        self.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {place} %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        # A disk that is full stops the run where it writes its results; its log has no say in that.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(self.format(record) + "\n")


def _attach(path: Path, process: str) -> list[logging.Handler]:
    """Begin to log to the file; returns the handlers that were added to the root logger."""
    root, package = logging.getLogger(), logging.getLogger(_PACKAGE)
    # Without any handler Python shows warnings on stderr by its last resort, and with this one it would not.
    added = [logging.lastResort] if logging.lastResort and not root.handlers else []
    added.append(_Appending(path, process))
    for handler in added:
        root.addHandler(handler)
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    return added


@contextlib.contextmanager
def run_log(path: Path, process: str) -> Iterator[None]:
    """Log to a run's log in the block, and in the workers that are started there: this package's lines of level INFO,
    and others as the root logger has it, by default warnings. An error that ends the block is logged as well."""
    level, before = logging.getLogger(_PACKAGE).level, os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(path.resolve())
    added = _attach(path.resolve(), process)
    try:
        yield
    except BaseException:
        logger.info("the run ends here:", exc_info=True)
        raise
    finally:
        for handler in added:
            logging.getLogger().removeHandler(handler)
        logging.getLogger(_PACKAGE).setLevel(level)
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def join_run_log(process: str) -> None:
    """In a worker's process: log to the log of the run that started it, for good."""
    path = os.environ.get(VARIABLE)
    if path and not any(isinstance(handler, _Appending) for handler in logging.getLogger().handlers):
        _attach(Path(path), process)
