"""The length of a round, from what each client is sent, computes and sends, and from the link's rate.

A round is the longest of its visits, each of which is message down, computing, message up; then the server's work.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from simpy import Environment, Event

from semcons_ray.timeline.pipe import Pipe


@dataclass(frozen=True)
class Visit:
    """A client's part of a round.

    Attributes:
        down_bytes: Length of the message to it.
        compute_seconds: How long it computes between the two messages.
        up_bytes: Length of its message.
        collect_seconds: How long the server works on that message alone, such as to embed its answers.
    """

    down_bytes: float
    compute_seconds: float
    up_bytes: float
    collect_seconds: float = 0.0


@dataclass(frozen=True)
class Link:
    """What carries messages, in each of both directions.

    Attributes:
        mbit: Rate in Mbit/s, of packets with their headers.
        shared: Whether all clients share it, evenly at any time; if not, each has one of its own.
        efficiency: Length of a message as a share of what is sent for it, 0 to 1.
        call_seconds: Time of a visit in which nothing is sent and computed.
        background_bytes_per_second: What is sent all the time for each client, without any message.
    """

    mbit: float
    shared: bool = False
    efficiency: float = 1.0
    call_seconds: float = 0.0
    background_bytes_per_second: float = 0.0

    def message_rate(self, num_clients: int) -> float:
        """Bytes of messages a second that it carries beside the background."""
        users = num_clients if self.shared else 1
        return self.efficiency * (self.mbit * 1e6 / 8 - users * self.background_bytes_per_second)


def round_seconds(visits: Sequence[Visit], link: Link, conclude_seconds: float = 0.0) -> float:
    """How long a round takes, if all visits begin at once.

    Args:
        visits: Of all clients.
        link: Between clients and server.
        conclude_seconds: How long the server works when all messages are there.
    """
    came = arrivals([0.0] * len(visits), [visit.down_bytes for visit in visits], link)
    ready = [at + visit.compute_seconds for at, visit in zip(came, visits, strict=True)]
    received = arrivals(ready, [visit.up_bytes for visit in visits], link)
    done = 0.0
    for at, visit in sorted(zip(received, visits, strict=True), key=lambda pair: pair[0]):
        done = max(done, at) + visit.collect_seconds  # one message after the other, while others are on their way
    return link.call_seconds + done + conclude_seconds


def arrivals(starts: Sequence[float], sizes: Sequence[float], link: Link) -> list[float]:
    """When each transfer in one direction ends, in seconds.

    Args:
        starts: When each begins, seconds.
        sizes: Bytes of each.
        link: What carries them.
    """
    rate = link.message_rate(len(starts))
    env, ends = Environment(), [0.0] * len(starts)
    pipe = Pipe(env, rate if link.shared else rate * len(starts))  # the virtual clock's own

    def transfer(place: int) -> Generator[Event, None, None]:
        yield env.timeout(starts[place])
        if sizes[place] and math.isfinite(rate):
            yield pipe.transfer(sizes[place], rate)
        ends[place] = env.now

    for place in range(len(starts)):
        env.process(transfer(place))
    env.run()
    return ends
