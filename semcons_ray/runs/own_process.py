"""A run in a process that is not its own, such as a notebook's: it leaves the process as it found it."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

import torch

_TURN = threading.RLock()


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Put back, at the end of the block, what a run changes in its process: torch's number of threads, filters of
    warnings and levels of loggers.

    A process does one run at a time, since all of these hold for the whole process: a run in another thread waits.
    """
    with _TURN, warnings.catch_warnings(), _levels():
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _levels() -> Iterator[None]:
    named = logging.getLogger().manager.loggerDict.values()
    loggers = [logging.getLogger(), *(one for one in named if isinstance(one, logging.Logger))]
    before = [(logger, logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
