"""Federations with numbers that are easy to reckon with."""

from collections.abc import Sequence

from semcons_ray.timeline.availability import Always, Availability
from semcons_ray.timeline.clock import Clock, Site
from semcons_ray.timeline.devices import Device, Model
from semcons_ray.timeline.links import Link
from semcons_ray.timeline.members import Members
from semcons_ray.timeline.policies import Policy, Synchronous
from semcons_ray.timeline.work import Visit

MODEL = Model(parameters=1_000_000, layers=1)
WIRE = 1500 / 1448
"""Bytes on the line for each of a message."""


def device(tokens_per_second: float) -> Device:
    """One that trains on so many tokens a second, and reads and writes twice as many."""
    return Device(
        peak_tflops=4e6 * tokens_per_second / 1e12, memory_gb=1, memory_bandwidth_gb_s=1e6, idle_watts=1, busy_watts=10,
        training_utilization=1, generation_utilization=1,
    )  # fmt: skip


def link(bytes_per_second: float, latency_seconds: float = 0.0) -> Link:
    """One that carries so many bytes of messages a second, either way."""
    mbit = bytes_per_second * WIRE * 8 / 1e6
    return Link(up_mbit=mbit, down_mbit=mbit, latency_ms=1e3 * latency_seconds)


class Same:
    """All clients have one model."""

    def __getitem__(self, client_id: int, /) -> Model:
        return MODEL


class Given(Members):
    """Clients whose devices and links are given in order, and not drawn."""

    def __init__(self, devices: Sequence[Device], links: Sequence[Link], dropout: float = 0.0) -> None:
        names = [f"{place:03d}" for place in range(len(devices))]
        equal = dict.fromkeys(names, 1.0)
        given_devices, given_links = (dict(zip(names, given, strict=True)) for given in (devices, links))
        super().__init__(len(devices), 0, (equal, given_devices), (equal, given_links), dropout=dropout)
        for drawn in (self.devices, self.links):
            drawn.of_client[:] = range(len(devices))


def clock(
    devices: Sequence[Device],
    links: Sequence[Link],
    policy: Policy | None = None,
    *,
    server: Link | None = None,
    availability: Availability | None = None,
    dropout: float = 0.0,
) -> Clock:
    """A clock of these clients, whose server's link is too fast to matter if none is given."""
    site = Site(device(1e12), server or link(1e15))
    members = Given(devices, links, dropout)
    parts = (members, site, policy or Synchronous(), availability or Always(), Same())
    return Clock(*parts, batch_size=1, step_tokens=1.0)


def visit(client_id: int, round: int, *, down: int = 0, trained: int = 0, generated: int = 0, up: int = 0) -> Visit:
    """What a client does."""
    return Visit(client_id, round, down, trained, 0, generated, up)
