"""When clients are there: from when on, and until when."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from semcons_ray.errors import ConfigError
from semcons_ray.metering.ledger import Span, merged

Window = Span
"""From when a client is there, and until when, in virtual seconds."""

HOUR, DAY = 3600.0, 86400.0


class Availability(Protocol):
    """When clients are there."""

    def window(self, client_id: int, chance: float, seconds: float) -> Window:
        """The first stretch of time in which a client is there that ends after `seconds`.

        Args:
            client_id: The client.
            chance: A number of the client's own, uniform in [0, 1), the same at each call.
            seconds: Virtual time since the run began.

        Returns:
            Its begin, which may be before `seconds`, and its end; infinity for both if the client never comes again.
        """
        ...


@dataclass(frozen=True)
class Always:
    """Every client is always there."""

    def window(self, client_id: int, chance: float, seconds: float) -> Window:
        """See `Availability.window`."""
        return -math.inf, math.inf


@dataclass(frozen=True)
class Diurnal:
    """Every client is there for the same number of hours a day, each in a time zone of its own: as a phone that takes
    part while it is charged at night (K. Bonawitz et al., "Towards Federated Learning at Scale", arXiv:1902.01046,
    section 9).

    Attributes:
        hours: Hours a day.
        zones_hours: Over how many hours the time zones are spread; 0: all clients come and go together.
    """

    hours: Annotated[float, Field(gt=0, le=24)] = 8.0
    zones_hours: Annotated[float, Field(ge=0, le=24)] = 24.0

    def window(self, client_id: int, chance: float, seconds: float) -> Window:
        """See `Availability.window`."""
        if self.hours == DAY / HOUR:
            return -math.inf, math.inf
        first, length = chance * self.zones_hours * HOUR, self.hours * HOUR
        day = math.floor((seconds - first - length) / DAY) + 1
        return first + day * DAY, first + day * DAY + length


class Trace:
    """Clients are there when a file says so, which is repeated when it ends.

    Its rows are `client_id,start_hours,end_hours`, with these column names; a client of which it says nothing is never
    there. Clients take turns if it has fewer than there are: client c is as client c modulo their number.

    Args:
        path: A CSV file.
        hours: After how many hours it begins anew; None: after its last end.

    Raises:
        ConfigError: The file is not there, or a row is not as it must be.
    """

    def __init__(self, path: str, hours: float | None = None) -> None:
        self._windows: dict[int, list[Window]] = {}
        where = f"federation.availability_options.path {path}"
        try:
            with Path(path).expanduser().open(newline="", encoding="utf-8") as file:
                rows = [*csv.DictReader(file)]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {error}") from error
        for number, row in enumerate(rows, start=2):
            client, start, end = _parsed(row, f"{where}, line {number}")
            self._windows.setdefault(client, []).append((start * HOUR, end * HOUR))
        if not self._windows:
            raise ConfigError(f"{where} says of no client when it is there")
        last = max(end for windows in self._windows.values() for _, end in windows)
        self._period = last if hours is None else hours * HOUR
        if self._period < last:
            raise ConfigError(f"federation.availability_options.hours {hours} is before the last end in {path}")
        self._num_clients = max(self._windows) + 1
        self._windows = {client: merged(windows) for client, windows in self._windows.items()}

    def window(self, client_id: int, chance: float, seconds: float) -> Window:
        """See `Availability.window`."""
        windows = self._windows.get(client_id % self._num_clients)
        if not windows:
            return math.inf, math.inf
        turn, within = divmod(seconds, self._period)
        place = bisect_right([end for _, end in windows], within)
        if place == len(windows):
            turn, place = turn + 1, 0
        start, end = windows[place]
        return start + turn * self._period, end + turn * self._period


def _parsed(row: Mapping[str, str | None], where: str) -> tuple[int, float, float]:
    try:
        client, start, end = int(row["client_id"] or ""), float(row["start_hours"] or ""), float(row["end_hours"] or "")
    except KeyError as error:
        raise ConfigError(f"{where}: there is no column {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if client < 0 or not 0 <= start < end < math.inf:
        raise ConfigError(f"{where}: a client from 0, and a start before its end, from 0, are expected")
    return client, start, end


def is_ever_there(availability: Availability, chances: Sequence[float]) -> bool:
    """Whether any of the clients, each with its `chance`, ever comes."""
    return any(availability.window(client, chance, 0.0)[0] < math.inf for client, chance in enumerate(chances))
