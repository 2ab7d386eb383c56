"""Who has which device and link."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from semcons_ray.config import FederationConfig
from semcons_ray.errors import ConfigError
from semcons_ray.timeline.availability import DAY, HOUR, Diurnal
from semcons_ray.timeline.devices import Model
from semcons_ray.timeline.federation import Federation
from semcons_ray.timeline.members import Drawn
from tests.timeline.worlds import Same, device, link, visit


def drawn(shares: dict[str, float], num_clients: int, seed: int = 0) -> Counter[str]:
    found = Drawn[str].of(shares, {name: name for name in shares}, num_clients, [seed])
    assert len(found.of_client) == num_clients
    assert {name: len(clients) for name, clients in found.clients()} == {
        **dict.fromkeys(sorted(shares), 0),
        **Counter(found.name(client) for client in range(num_clients)),
    }
    return Counter(found[client] for client in range(num_clients))


def test_shares_are_met_as_nearly_as_whole_clients_allow() -> None:
    assert drawn({"a": 3, "b": 1}, 4) == {"a": 3, "b": 1}
    assert drawn({"a": 3, "b": 1}, 10) in ({"a": 8, "b": 2}, {"a": 7, "b": 3})
    assert drawn({"a": 0.1, "b": 0.2}, 3) == {"a": 1, "b": 2}
    assert drawn({"a": 1, "b": 1, "c": 1}, 1_000_000).most_common()[0][1] == 333_334


def test_who_has_what_is_drawn_by_seed() -> None:
    def places(seed: int) -> list[int]:
        return Drawn[int].of({"a": 1, "b": 1}, {"a": 0, "b": 1}, 50, [seed]).of_client.tolist()

    assert places(0) == places(0)
    assert places(0) != places(1)


def federation(**settings: object) -> Federation:
    return Federation.of(FederationConfig(**{"devices": {"laptop-cpu": 1}, **settings}))  # type: ignore[arg-type]


def test_devices_and_links_are_drawn_apart() -> None:
    made = federation(devices={"laptop-cpu": 1, "phone": 1}, links={"dsl": 1, "4g": 1})
    members = made.clock(1000, 0, Same(), batch_size=1, step_tokens=1.0).members
    both = Counter((members.devices.name(client), members.links.name(client)) for client in range(1000))
    assert all(abs(count - 250) < 4 * math.sqrt(1000 * 3 / 16) for count in both.values())
    assert len(both) == 4
    assert 0.45 < np.mean(members.chances) < 0.55


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": {"laptop": 1}}, "federation.devices: there is no device laptop"),
        ({"server_device": "h1000"}, "federation.server_device: there is no device h1000"),
        ({"server_link": "x"}, "federation.server_link: there is no link x"),
        ({"own_links": {"dsl": {"up_mbit": 0}}, "links": {"dsl": 1}}, "federation.own_links.dsl: up_mbit"),
        ({"own_devices": {"laptop-cpu": {"peak": 1}}}, "federation.own_devices.laptop-cpu: there is no peak"),
        ({"policy": "deadline"}, "federation.policy_options: deadline needs hours"),
        ({"policy": "deadline", "policy_options": {"hours": 0}}, "federation.policy_options.hours"),
        ({"policy": "semi_async", "policy_options": {"buffer_size": 0}}, "federation.policy_options.buffer_size"),
        ({"policy": "async", "policy_options": {"buffer_size": 2}}, "federation.policy_options.buffer_size"),
        ({"availability": "diurnal", "availability_options": {"hours": 25}}, "federation.availability_options.hours"),
        ({"region": "mars"}, "federation.region"),
    ],
)
def test_a_federation_that_cannot_be(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        federation(**settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_federation_in_which_nobody_is_ever_there(tmp_path) -> None:
    (tmp_path / "trace.csv").write_text("client_id,start_hours,end_hours\n7,0,1\n")
    made = federation(availability="trace", availability_options={"path": str(tmp_path / "trace.csv")})
    said = r"federation\.availability trace: none of clients\.num_clients = 4 is ever there"
    with pytest.raises(ConfigError, match=said):
        made.clock(4, 0, Same(), batch_size=1, step_tokens=1.0)
    made.clock(8, 0, Same(), batch_size=1, step_tokens=1.0)


def test_a_model_that_does_not_fit_is_refused_by_the_device_that_somebody_has() -> None:
    big = Model(parameters=10**11, layers=80)

    class Big:
        def __getitem__(self, client_id: int, /) -> Model:
            return big

    with pytest.raises(ConfigError, match=r"federation\.devices: laptop-cpu has 32 GB of memory"):
        federation().clock(1, 0, Big(), batch_size=1, step_tokens=1.0)
    federation(devices={"16xh100": 1}).clock(1, 0, Big(), batch_size=1, step_tokens=1.0)


def test_availability_is_spread_by_a_number_of_each_clients_own() -> None:
    begins = {Diurnal(hours=8).window(client, client / 10, 0)[0] for client in range(10)}
    assert len(begins) == 10
    assert device(50).flops == 4e6 * 50
    assert link(100).up_bytes_per_second == pytest.approx(100)


@dataclass(frozen=True)
class Weekends:
    """An availability of one's own: the last two of seven days."""

    hours: float = 48.0

    def window(self, client_id: int, chance: float, seconds: float) -> tuple[float, float]:
        week = 7 * DAY
        start = math.floor(seconds / week) * week + 5 * DAY
        return start, start + self.hours * HOUR


@dataclass(frozen=True)
class HalfOf:
    """A policy of one's own: a round ends when so many have answered, and nobody is heard late."""

    most: int

    keeps_late: ClassVar[bool] = False
    seconds: ClassVar[float] = math.inf

    def is_enough(self, num_arrived: int) -> bool:
        return num_arrived >= self.most


def test_parts_of_ones_own() -> None:
    made = federation(
        availability="tests.timeline.test_members:Weekends",
        availability_options={"hours": 10},
        policy="tests.timeline.test_members:HalfOf",
        policy_options={"most": 2},
    )
    clock = made.clock(4, 0, Same(), batch_size=1, step_tokens=1.0)
    closed = clock.round(1, [visit(client, 1, trained=10 * (client + 1)) for client in range(4)])
    assert len(closed.arrived) == 2
    assert closed.closed_at > 5 * DAY
    with pytest.raises(ConfigError, match=r"federation\.policy_options: .* needs most"):
        federation(policy="tests.timeline.test_members:HalfOf")
