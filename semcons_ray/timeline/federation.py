"""A federation's clock, made from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from semcons_ray.config import ByClient, FederationConfig
from semcons_ray.errors import ConfigError
from semcons_ray.parts import build
from semcons_ray.timeline.availability import Availability, is_ever_there
from semcons_ray.timeline.clock import Clock, Site
from semcons_ray.timeline.devices import Device, Model
from semcons_ray.timeline.links import Link
from semcons_ray.timeline.members import Members
from semcons_ray.timeline.policies import Policy
from semcons_ray.timeline.profiles import device, link, model, region


@dataclass(frozen=True)
class Federation:
    """A federation as its settings say, with all names looked up.

    Attributes:
        settings: The settings.
        model: The model for whose size times are calculated; None: the clients' own.
        devices: Devices of clients by name.
        links: Links of clients by name.
        server_device: The server's device.
        server_link: The server's link.
        availability: When clients are there.
        policy: When a round ends.
    """

    settings: FederationConfig
    model: Model | None
    devices: Mapping[str, Device]
    links: Mapping[str, Link]
    server_device: Device
    server_link: Link
    availability: Availability
    policy: Policy

    @classmethod
    def of(cls, settings: FederationConfig) -> Federation:
        """Look all names up.

        Raises:
            ConfigError: A name is not known, or a profile of one's own or an option is not as it must be.
        """
        region(settings.region)  # refuses a name that is not known, before any work

        def device_of(name: str, setting: str) -> Device:
            own = settings.own_devices.get(name)
            return device({"name": name, **own}, f"federation.own_devices.{name}") if own else device(name, setting)

        def link_of(name: str, setting: str) -> Link:
            own = settings.own_links.get(name)
            return link({"name": name, **own}, f"federation.own_links.{name}") if own else link(name, setting)

        return cls(
            settings,
            model=model(settings.model, "federation.model") if settings.model else None,
            devices={name: device_of(name, "federation.devices") for name in settings.devices},
            links={name: link_of(name, "federation.links") for name in settings.links},
            server_device=device_of(settings.server_device, "federation.server_device"),
            server_link=link_of(settings.server_link, "federation.server_link"),
            availability=build("availability", settings.availability, settings.availability_options,
                               setting="federation.availability_options"),
            policy=build("policy", settings.policy, settings.policy_options, setting="federation.policy_options"),
        )  # fmt: skip

    def clock(
        self,
        num_clients: int,
        seed: int,
        models: ByClient[Model | None],
        *,
        batch_size: int,
        step_tokens: float,
    ) -> Clock:
        """A clock at the begin of round 1.

        Args:
            num_clients: Number of clients.
            seed: Who has which device and link follows from it, and who drops out.
            models: Each client's model; None: it computes elsewhere.
            batch_size: Prompts that a client answers at a time.
            step_tokens: Tokens that it trains on at a time.

        Raises:
            ConfigError: A model does not fit on a device that is given to a client, or nobody is ever there.
        """
        settings = self.settings
        members = Members(
            num_clients, seed, (settings.devices, self.devices), (settings.links, self.links), dropout=settings.dropout
        )
        for name, client_ids in members.devices.clients():
            for one in {id(models[client]): models[client] for client in client_ids}.values():
                if one:
                    self.devices[name].fits(one)
        if not is_ever_there(self.availability, members.chances.tolist()):
            raise ConfigError(
                f"federation.availability {settings.availability}: none of clients.num_clients = {num_clients} is ever "
                "there"
            )
        site = Site(self.server_device, self.server_link)
        parts = (members, site, self.policy, self.availability, models)
        return Clock(*parts, batch_size=batch_size, step_tokens=step_tokens)
