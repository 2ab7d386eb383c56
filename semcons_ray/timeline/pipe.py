"""A pipe: one direction of the server's link, which all transfers of that direction share."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import count

from simpy import Environment, Event

ROUNDING = 1e-9
"""Share of a transfer by which the ends of two that are the same may differ by rounding."""


class _Alike:
    """Transfers in progress over lines of one speed, which at any time all go at the same rate.

    Attributes:
        rate: Bytes a second of each.
        served: Bytes that a transfer would have moved by now had it been here from the start.
        open: For each transfer, the value of `served` at which it is done, its number, and what happens then; a heap.
    """

    __slots__ = ("open", "rate", "served")

    def __init__(self) -> None:
        self.rate = self.served = 0.0
        self.open: list[tuple[float, int, Event]] = []


class Pipe:
    """Transfers that share a capacity fairly: each goes as fast as its own line lets it, and what slow ones leave of it
    is divided evenly among the others (max-min fairness: D. Bertsekas and R. Gallager, "Data Networks", section 6.5.2,
    for one shared link; so do TCP's flows of equal round-trip times, in the long run).

    Transfers whose lines are equally fast are kept together, so an event costs a time that grows with the number of
    different speeds, and with the logarithm of the number of transfers.

    Args:
        env: The simulation.
        capacity: Bytes a second of all transfers together.
    """

    def __init__(self, env: Environment, capacity: float) -> None:
        self._env = env
        self._capacity = capacity
        self._by_speed: dict[float, _Alike] = {}
        self._num_open = 0
        self._since = 0.0
        self._numbers = count()
        self._next_look = math.inf

    def transfer(self, size: float, speed: float) -> Event:
        """What happens when `size` bytes are through, over a line of `speed` bytes a second."""
        done = Event(self._env)
        self._move_on()
        if speed not in self._by_speed:
            self._by_speed[speed] = _Alike()
            self._by_speed = dict(sorted(self._by_speed.items()))
        alike = self._by_speed[speed]
        heappush(alike.open, (alike.served + size, next(self._numbers), done))
        self._num_open += 1
        self._share()
        return done

    def _move_on(self) -> None:
        """Move on what is in progress, at the rates that it has had since the last change."""
        now = self._env.now
        seconds, self._since = now - self._since, now
        for alike in self._by_speed.values():
            alike.served += alike.rate * seconds

    def _share(self) -> None:
        """Divide the capacity anew, and look again when the first transfer is done."""
        capacity, others, soonest = self._capacity, self._num_open, math.inf
        for speed, alike in self._by_speed.items():  # the slowest first
            rate = alike.rate = min(speed, capacity / others)
            num = len(alike.open)
            capacity -= rate * num
            others -= num
            soonest = min(soonest, (alike.open[0][0] - alike.served) / rate)
        look = self._env.now + max(soonest, 0.0)
        if look < self._next_look:  # else there is a look before, which makes a new one
            self._next_look = look
            self._env.timeout(look - self._env.now, look).callbacks.append(self._look)

    def _look(self, timer: Event) -> None:
        """End the transfers that are done."""
        if timer.value != self._next_look:  # an earlier look has been made in the meantime
            return
        self._next_look = math.inf
        self._move_on()
        instant = 2 * math.ulp(self._env.now)
        for speed, alike in [*self._by_speed.items()]:
            reached = alike.served * (1 + ROUNDING) + alike.rate * instant
            while alike.open and alike.open[0][0] <= reached:
                heappop(alike.open)[2].succeed()
                self._num_open -= 1
            if not alike.open:
                del self._by_speed[speed]
        if self._by_speed:
            self._share()
