"""Observers of a run: progress in the terminal, Prometheus, trackers, a copy at a URL. They change nothing in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from semcons_ray.errors import first_line
from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.run_folder import Commit

logger = logging.getLogger(__name__)


class Observer:
    """Is told of the progress of a run. A subclass has the methods for what it wants to hear of."""

    name: str = "an observer"
    """What it is called if it fails."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def planned(self, text: str) -> None:
        """Text for the user before work begins: losses of data, and the placement with a line for each worker."""

    def begins(self, commits: Sequence[Commit]) -> None:
        """Rounds begin, or go on after those that are committed already."""

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        """Clients begin to be visited; round 0 measures the base model."""

    def client_done(self, reply: Reply) -> None:
        """A client was visited."""

    def round_ends(self, commit: Commit) -> None:
        """A round is committed."""

    def ends(self, *, finished: bool) -> None:
        """Rounds end: all are done, or the run has failed or was stopped."""


class Logged(Observer):
    """Logs all that happens."""

    name = "logging"

    def stage(self, text: str) -> None:
        """See `Observer.stage`."""
        logger.info("%s", text)

    def planned(self, text: str) -> None:
        """See `Observer.planned`."""
        logger.info("%s", text)

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        """See `Observer.round_begins`."""
        logger.info("round %d of %d begins with %d clients", round, num_rounds, num_participants)

    def client_done(self, reply: Reply) -> None:
        """See `Observer.client_done`."""
        tokens, seconds = sum(row.tokens for row in reply.rows), sum(row.duration_seconds for row in reply.rows)
        logger.info("round %d: client %d is done, %d tokens, %.1f s", reply.round, reply.client_id, tokens, seconds)

    def round_ends(self, commit: Commit) -> None:
        """See `Observer.round_ends`."""
        summary = commit.summary
        told = f", left out: {summary.failures}" if summary.lost else ""
        if summary.distrusted:
            told += f", distrusted by the defence: clients {summary.distrusted}"
        logger.info("round %d is committed after %.1f s%s", summary.round, summary.duration_seconds, told)

    def ends(self, *, finished: bool) -> None:
        """See `Observer.ends`."""
        logger.info("the run is finished" if finished else "the run stops before its end")


class Observers(Observer):
    """Several observers as one. One that fails is named in a warning and told nothing more; the run goes on."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = list(observers)

    def stage(self, text: str) -> None:
        """See `Observer.stage`."""
        self._tell(lambda observer: observer.stage(text))

    def planned(self, text: str) -> None:
        """See `Observer.planned`."""
        self._tell(lambda observer: observer.planned(text))

    def begins(self, commits: Sequence[Commit]) -> None:
        """See `Observer.begins`."""
        self._tell(lambda observer: observer.begins(tuple(commits)))

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        """See `Observer.round_begins`."""
        self._tell(lambda observer: observer.round_begins(round, num_rounds, num_participants))

    def client_done(self, reply: Reply) -> None:
        """See `Observer.client_done`."""
        self._tell(lambda observer: observer.client_done(reply))

    def round_ends(self, commit: Commit) -> None:
        """See `Observer.round_ends`."""
        self._tell(lambda observer: observer.round_ends(commit))

    def ends(self, *, finished: bool) -> None:
        """See `Observer.ends`."""
        self._tell(lambda observer: observer.ends(finished=finished))

    @contextlib.contextmanager
    def during(self, commits: Sequence[Commit]) -> Iterator[None]:
        """Tell them that rounds begin, and at the end of the block how they ended."""
        finished = False
        try:
            self.begins(commits)
            yield
            finished = True
        finally:
            self.ends(finished=finished)

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in tuple(self._observers):
            try:
                event(observer)
            except Exception as error:
                self._observers.remove(observer)
                logger.warning("%s failed, and is left out from now on: %s", observer.name, first_line(error))
                logger.info("%s failed so:", observer.name, exc_info=error)


class StagesOnly(Observers):
    """Several observers, told of the stages of a dry run but not of the plan, which is its result."""

    def planned(self, text: str) -> None:
        """Say nothing."""
