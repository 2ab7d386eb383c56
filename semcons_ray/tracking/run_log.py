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

    def __init__(self, path: Path, process: str, afar: LogAfar | None = None) -> None:
        super().__init__()
        self._path = path
        self._afar = afar
        place = f"{process}@{socket.gethostname()}".replace("%", "%%")
        self.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {place} %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        if self._afar is not None and not self._path.is_file():
            self._afar.add(line)
        else:
            self.write(line)

    def write(self, lines: str) -> None:
        """Append lines to the file."""
        # A disk that is full stops the run where it writes its results; its log has no say in that.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(lines)


def _attach(path: Path, process: str, afar: LogAfar | None = None) -> list[logging.Handler]:
    """Begin to log to the file; returns the handlers that were added to the root logger."""
    root, package = logging.getLogger(), logging.getLogger(_PACKAGE)
    # Without any handler Python shows warnings on stderr by its last resort, and with this one it would not.
    added = [logging.lastResort] if logging.lastResort and not root.handlers else []
    added.append(_Appending(path, process, afar))
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
    with contextlib.suppress(OSError):
        path.touch()  # workers see by it that they see the folder
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


class LogAfar:
    """Lines of a process that does not see the run's folder, for the driver to add to the log."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        """Keep a line, with its end."""
        self._lines.append(line)

    def take(self) -> str:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return "".join(lines)


def join_run_log(process: str) -> LogAfar:
    """In a worker's process: log to the log of the run that started it, for good; or, where its folder is not seen, to
    what is returned."""
    path, afar = os.environ.get(VARIABLE), LogAfar()
    if path and not any(isinstance(handler, _Appending) for handler in logging.getLogger().handlers):
        _attach(Path(path), process, afar)
    return afar


def append_to_log(lines: str) -> None:
    """In the driver: add lines of a process that does not see the run's folder."""
    for handler in logging.getLogger().handlers:
        if lines and isinstance(handler, _Appending):
            handler.write(lines)
