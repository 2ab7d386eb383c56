"""How much may be asked of an endpoint: caps over the whole run, and the pace of requests."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from semcons_ray.config import EndpointConfig


class Amount(NamedTuple):
    """What requests take: their number, their tokens, and their price in US dollars."""

    requests: int = 0
    tokens: int = 0
    usd: float = 0.0

    def plus(self, other: Amount) -> Amount:
        """The sum of both."""
        return Amount(self.requests + other.requests, self.tokens + other.tokens, self.usd + other.usd)

    def minus(self, other: Amount) -> Amount:
        """What is left of it."""
        return Amount(self.requests - other.requests, self.tokens - other.tokens, self.usd - other.usd)


class Budget:
    """Keeps what requests take within caps.

    A request is let through only if the caps hold even if it takes the most that it can. If they would not because of
    requests under way, it waits for these to end.

    Args:
        options: The endpoint's settings.
        spent: What was taken already.
    """

    def __init__(self, options: EndpointConfig, spent: Amount) -> None:
        self._options = options
        self._spent = spent
        self._booked = Amount()
        self._settled = threading.Condition()
        self.reached = ""

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        """The price of a request, in US dollars."""
        prices = self._options.usd_per_million_input_tokens, self._options.usd_per_million_output_tokens
        return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6

    def book(self, most: Amount) -> bool:
        """Let a request through that takes at most so much; False once a cap is reached, whose name `reached` has."""
        with self._settled:
            while not self.reached:
                over = self._over(self._spent.plus(self._booked).plus(most))
                if not over:
                    self._booked = self._booked.plus(most)
                    return True
                if self._booked.requests:
                    self._settled.wait()
                else:
                    self.reached = over
            return False

    def settle(self, most: Amount, taken: Amount) -> None:
        """A request that was let through is done, and took so much."""
        with self._settled:
            self._booked = self._booked.minus(most)
            self._spent = self._spent.plus(taken)
            self._settled.notify_all()

    def _over(self, amount: Amount) -> str:
        """The cap that does not hold; empty if all do."""
        caps = (
            ("max_requests", self._options.max_requests, amount.requests),
            ("max_tokens_total", self._options.max_tokens_total, amount.tokens),
            ("max_usd", self._options.max_usd, amount.usd),
        )
        return next((name for name, cap, value in caps if cap is not None and value > cap), "")


class Pace:
    """Lets requests go one by one, evenly spaced; any number of threads may wait for their turn.

    Args:
        per_minute: Most requests in a minute; None: any number.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.seconds = 60.0 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Wait for the next turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.seconds
        time.sleep(turn - now)
