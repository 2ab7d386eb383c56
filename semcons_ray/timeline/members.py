"""Who is in a federation: the device, the link and the time zone of each client, drawn by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from semcons_ray.timeline.devices import Device
from semcons_ray.timeline.links import Link

Profile = TypeVar("Profile")

_DEVICES, _LINKS, _ZONES, _DROPOUTS = range(4)
"""Streams of random numbers of one seed."""


class Member(NamedTuple):
    """What a client has.

    Attributes:
        device: Its device.
        link: Its link to the server.
        chance: See `Availability.window`.
    """

    device: Device
    link: Link
    chance: float


@dataclass(frozen=True)
class Drawn(Generic[Profile]):
    """One of several profiles for each client, in numbers as near to the shares wanted as whole clients allow.

    Attributes:
        names: Names of the profiles.
        profiles: The profiles, in the order of their names.
        of_client: Which of them each client has, (C,).
    """

    names: tuple[str, ...]
    profiles: tuple[Profile, ...]
    of_client: NDArray[np.int32]

    @classmethod
    def of(
        cls, shares: Mapping[str, float], profiles: Mapping[str, Profile], num_clients: int, seed: Sequence[int]
    ) -> Self:
        """Divide clients among profiles, those with the largest remainders first, and mix them."""
        names = tuple(sorted(shares))
        wanted = np.array([shares[name] for name in names]) / sum(shares.values()) * num_clients
        counts = np.floor(wanted + 1e-9).astype(int)
        largest = np.argsort(-(wanted - counts), kind="stable")
        counts[largest[: num_clients - counts.sum()]] += 1
        mixed = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(names), dtype=np.int32), counts))
        return cls(names, tuple(profiles[name] for name in names), mixed)

    def __getitem__(self, client_id: int) -> Profile:
        return self.profiles[int(self.of_client[client_id])]

    def name(self, client_id: int) -> str:
        """Name of the client's profile."""
        return self.names[int(self.of_client[client_id])]

    def clients(self) -> Iterator[tuple[str, list[int]]]:
        """Ids of the clients that have each profile, by its name."""
        for place, name in enumerate(self.names):
            yield name, np.flatnonzero(self.of_client == place).tolist()


class Members:
    """The clients of a federation.

    Args:
        num_clients: Number C of clients.
        seed: All that is drawn follows from it.
        devices: Shares of clients by device, and the devices.
        links: The same for links.
        dropout: Chance that a client is gone before its answers are through, at each visit.
    """

    def __init__(
        self,
        num_clients: int,
        seed: int,
        devices: tuple[Mapping[str, float], Mapping[str, Device]],
        links: tuple[Mapping[str, float], Mapping[str, Link]],
        *,
        dropout: float = 0.0,
    ) -> None:
        self.devices = Drawn[Device].of(*devices, num_clients, [seed, _DEVICES])
        self.links = Drawn[Link].of(*links, num_clients, [seed, _LINKS])
        self.chances: NDArray[np.float64] = np.random.default_rng([seed, _ZONES]).random(num_clients)
        self._seed, self._dropout = seed, dropout
        self._drawn_in, self._drops = 0, np.empty(0)

    def __len__(self) -> int:
        return len(self.chances)

    def __getitem__(self, client_id: int) -> Member:
        return Member(self.devices[client_id], self.links[client_id], float(self.chances[client_id]))

    def drops_out(self, client_id: int, round: int) -> bool:
        """Whether the client is gone before the answers of its visit in this round are through."""
        if self._dropout and self._drawn_in != round:
            self._drawn_in = round
            self._drops = np.random.default_rng([self._seed, _DROPOUTS, round]).random(len(self))
        return bool(self._dropout) and bool(self._drops[client_id] < self._dropout)
