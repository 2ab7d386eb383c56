"""When the server ends a round, and what becomes of those who are late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import Field


class Policy(Protocol):
    """When the server ends a round."""

    @property
    def keeps_late(self) -> bool:
        """Whether answers that come after a round's end count in the next, instead of not at all."""
        ...

    @property
    def seconds(self) -> float:
        """Longest time from a round's begin to its end; infinity: there is none."""
        ...

    def is_enough(self, num_arrived: int) -> bool:
        """Whether a round ends now, before all have answered.

        Args:
            num_arrived: How many answers have come in the round.
        """
        ...


@dataclass(frozen=True)
class Synchronous:
    """The server waits for everybody."""

    keeps_late: ClassVar[bool] = False
    seconds: ClassVar[float] = math.inf

    def is_enough(self, num_arrived: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Deadline:
    """Who is late has no vote in the round (K. Bonawitz et al., "Towards Federated Learning at Scale",
    arXiv:1902.01046, section 2.2). It keeps what it learnt, and is asked again in the first round that begins after it
    is done.

    Attributes:
        hours: Virtual hours from a round's begin to its end.
    """

    keeps_late: ClassVar[bool] = False

    hours: Annotated[float, Field(gt=0)]

    @property
    def seconds(self) -> float:
        """See `Policy.seconds`."""
        return self.hours * 3600.0

    def is_enough(self, num_arrived: int) -> bool:
        """Never before the deadline."""
        return False


@dataclass(frozen=True)
class SemiAsync:
    """A round ends with the answer that fills the server's buffer, and those who are still at work are heard in a later
    one (J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", FedBuff, arXiv:2106.06639).

    Attributes:
        buffer_size: Answers in a round, K in the paper.
    """

    keeps_late: ClassVar[bool] = True
    seconds: ClassVar[float] = math.inf

    buffer_size: Annotated[int, Field(ge=1)]

    def is_enough(self, num_arrived: int) -> bool:
        """Whether the buffer is full."""
        return num_arrived >= self.buffer_size


@dataclass(frozen=True)
class Async(SemiAsync):
    """Every answer is a round (C. Xie et al., "Asynchronous Federated Optimization", FedAsync, arXiv:1903.03934)."""

    buffer_size: Annotated[int, Field(ge=1, le=1)] = 1
