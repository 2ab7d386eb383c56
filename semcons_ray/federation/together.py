"""Visits of clients that train together: each goes its own way up to where it learns, and waits there for the others.

What an algorithm has a client do before it learns and afterwards is code of its own, so each visit has a thread, as a
place where that code can wait. Only one of them works at a time, and only while `meet` waits for it: nothing here runs
beside anything else, and the order is the same each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from semcons_ray.federation.adapter_model import Learning


class LeftError(BaseException):
    """Ends a visit that waits for others when these will not come: no error of its own, which it could answer for."""


class _Guest:
    """A visit in a thread of its own, which stands still but while `go_on` waits for it.

    Attributes:
        learning: What it wants to learn; None: it has not begun, or is at its end.
        error: What it raised.
    """

    def __init__(self, visit: Callable[[Callable[[Learning], None]], None]) -> None:
        self.learning: Learning | None = None
        self.error: BaseException | None = None
        self._visit = visit
        self._fault: BaseException | None = None
        self._turn, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._work, name="visit", daemon=True).start()

    def go_on(self, fault: BaseException | None = None) -> None:
        """Let it work until it wants to learn, or to its end; `fault` is raised where it waits."""
        self._fault, self.learning = fault, None
        self._turn.release()
        try:
            self._rests.acquire()
        except BaseException:  # as Ctrl-C: what comes now may not run beside the visit
            self._rests.acquire()
            raise

    def _work(self) -> None:
        try:
            self._await_turn()
            self._visit(self._learn)
        except BaseException as error:  # for whoever asked for the visit
            self.error = error
        self._rests.release()

    def _learn(self, learning: Learning) -> None:
        self.learning = learning
        self._rests.release()
        self._await_turn()

    def _await_turn(self) -> None:
        self._turn.acquire()
        if self._fault is not None:
            raise self._fault


def meet(
    visits: Sequence[Callable[[Callable[[Learning], None]], None]], learn: Callable[[Sequence[Learning]], None]
) -> list[BaseException | None]:
    """Make visits one after another, but those that learn do so together.

    Args:
        visits: What each visit does; it calls its argument where it learns.
        learn: Learns for all that wait. What it raises is raised in each of them.

    Returns:
        What each visit raised, if it did.
    """
    guests = [_Guest(visit) for visit in visits]
    waiting, fault = guests, None
    try:
        while waiting:
            for guest in waiting:
                guest.go_on(fault)
            waiting, fault = [guest for guest in guests if guest.learning is not None], None
            if waiting:
                try:
                    learn([guest.learning for guest in waiting if guest.learning is not None])
                except Exception as error:
                    fault = error
    except BaseException:
        for guest in guests:
            if guest.learning is not None:
                guest.go_on(LeftError())
        raise
    return [guest.error for guest in guests]
