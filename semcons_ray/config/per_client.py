"""What differs from client to client, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Generic, Protocol, TypeVar

Value = TypeVar("Value")
Found = TypeVar("Found", covariant=True)


class ByClient(Protocol[Found]):
    """Something by client id: a mapping, a sequence, or a `PerClient`."""

    def __getitem__(self, client_id: int, /) -> Found:
        """What the client has."""
        ...


@dataclass(frozen=True)
class PerClient(Generic[Value]):
    """A value for each client, the same for most.

    Attributes:
        common: The value of all clients that are not in `own`.
        own: Values of clients that have another, by client id.
    """

    common: Value
    own: Mapping[int, Value] = field(default_factory=dict)

    __iter__: ClassVar[None] = None  # it has no end

    def __getitem__(self, client_id: int, /) -> Value:
        """The client's value."""
        return self.own.get(client_id, self.common)

    def distinct(self, clients: range) -> tuple[Value, ...]:
        """The different values of some clients, each once."""
        own = [self.own[client] for client in self.own if client in clients]
        return tuple(dict.fromkeys([self.common] * (len(own) < len(clients)) + own))


@lru_cache(maxsize=64)
def models_of(shares: tuple[tuple[str, float], ...], count: int) -> dict[str, range]:
    """Ids of the clients that have each model: shares of `count` clients rounded by largest remainder, in the order of
    the models. A model whose share is too small for one client is left out."""
    total = sum(share for _, share in shares)
    exact = {name: share / total * count for name, share in shares}
    sizes = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: sizes[name] - exact[name])
    for name in by_remainder[: count - sum(sizes.values())]:
        sizes[name] += 1
    ranges, start = dict[str, range](), 0
    for name, size in sizes.items():
        if size:
            ranges[name] = range(start, start + size)
            start += size
    return ranges
