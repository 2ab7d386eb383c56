"""What a client's link to the server carries: how many bytes a second, how late, and at how many joules."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from semcons_ray.timeline.devices import STRICT, NotNegative, Positive

MTU_BYTES = 1500
"""The largest packet of Ethernet, and so of most paths."""
SEGMENT_BYTES = MTU_BYTES - 52
"""What a packet carries: without 20 bytes of IPv4's header, 20 of TCP's and 12 of its timestamps."""
MATHIS_CONSTANT = math.sqrt(3 / 2)
"""Of a receiver that acknowledges every packet under periodic losses, the 1.22 of the paper's table 1."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Link:
    """A link of one client.

    Attributes:
        name: Its name in the table.
        description: What it is, for tables and reports.
        up_mbit: Rate of the line to the server, in Mbit/s, headers included.
        down_mbit: Rate of the line from the server.
        latency_ms: Time that a packet takes one way, in ms.
        loss: Share of packets that are lost other than by the connection's own filling of the line.
        joules_per_megabyte_up: Energy that the client's side takes for 10**6 bytes that it sends.
        joules_per_megabyte_down: The same for bytes that it gets.
        source: Where the numbers are from.
    """

    name: str = ""
    description: str = ""
    up_mbit: Positive
    down_mbit: Positive
    latency_ms: NotNegative = 0.0
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    joules_per_megabyte_up: NotNegative = 0.0
    joules_per_megabyte_down: NotNegative = 0.0
    source: str = ""

    @property
    def latency_seconds(self) -> float:
        """Time that a packet takes one way."""
        return self.latency_ms / 1e3

    @property
    def up_bytes_per_second(self) -> float:
        """Bytes of messages that one connection carries to the server in a second, once it is under way."""
        return self._payload(self.up_mbit)

    @property
    def down_bytes_per_second(self) -> float:
        """Bytes of messages that one connection carries from the server in a second, once it is under way."""
        return self._payload(self.down_mbit)

    def joules(self, up_bytes: float, down_bytes: float) -> float:
        """Energy of the client's side for so many bytes up and down."""
        return (up_bytes * self.joules_per_megabyte_up + down_bytes * self.joules_per_megabyte_down) / 1e6

    def _payload(self, mbit: float) -> float:
        """What is left of a line's rate without headers, at most what TCP reaches under the loss.

        A connection that halves its window at each loss carries SEGMENT / RTT * C / sqrt(loss) (Mathis et al., ACM
        Computer Communication Review 27(3), 1997, equation 3). Newer ways to control congestion, such as CUBIC and BBR,
        lose less by it, so this is the worse case.
        """
        line = mbit * 1e6 / 8 * SEGMENT_BYTES / MTU_BYTES
        round_trip = 2 * self.latency_seconds
        if self.loss == 0 or round_trip == 0:
            return line
        return min(line, SEGMENT_BYTES / round_trip * MATHIS_CONSTANT / math.sqrt(self.loss))
