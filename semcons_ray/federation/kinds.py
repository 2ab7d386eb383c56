"""Models of clients that are no adapter on a base model: parts of the kind "client", each named by a setting.

Such a model answers from elsewhere, or by whatever its class does. Its constructor gets by name those of the following
that it has parameters for, and its options, which are its further parameters:

    name               the model's name in `clients.models`
    client_id          the client
    seed               the experiment's seed
    embedding_model    name of the server's embedding model, for what looks for similar texts
    folder             a folder of this client in the run's folder, which a resumed run finds again
    system_prompt      `model.system_prompt`

See `modeling.client_model` for what it is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from semcons_ray.errors import ConfigError, writing
from semcons_ray.federation.fleet import client_folder
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.client_model import ClientModel
from semcons_ray.parts import build


@dataclass(frozen=True)
class KindModels:
    """Everything from which a worker makes models of clients of one kind.

    Attributes:
        name: The model's name in the settings.
        kind: The kind's name, or `module:object`.
        options: Its options.
        clients: The clients.
        embedding_model: Name of the server's embedding model.
        system_prompt: `model.system_prompt`.
        folder: Folder of the client stores, where each client has a folder of its own.
        environment: Names of the environment variables that it needs.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    clients: range
    embedding_model: str
    system_prompt: str
    folder: Path
    environment: tuple[str, ...] = ()
    keeps_files: ClassVar[bool] = True

    def make(self, seed: int, ledger: Ledger) -> Kept:
        """A model for each client.

        Raises:
            ConfigError: See `parts.build`.
        """
        models = Kept({client: self.model(client, seed) for client in self.clients})
        for client in models:
            with writing(self.folder):
                self._folder(client).mkdir(parents=True, exist_ok=True)
        return models

    def model(self, client: int, seed: int) -> ClientModel:
        """The model of a client.

        Raises:
            ConfigError: See `parts.build`.
        """
        offered: dict[str, Any] = {
            "name": self.name,
            "client_id": client,
            "seed": seed,
            "embedding_model": self.embedding_model,
            "folder": self._folder(client),
            "system_prompt": self.system_prompt,
        }
        setting = f"clients.models.{self.name}.options"
        model: ClientModel = build("client", self.kind, self.options, setting=setting, offered=offered)
        return model

    def needs(self, seed: int) -> tuple[str, ...]:
        """Names of the environment variables that the kind needs, all of which are there; its options are checked.

        Raises:
            ConfigError: One is missing; or see `parts.build`.
        """
        names = getattr(self.model(self.clients[0], seed), "environment", ())
        needed = tuple(names() if callable(names) else names)
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise ConfigError(
                f"clients.models.{self.name} needs the environment variable {', '.join(missing)}, which is not set"
            )
        return needed

    def _folder(self, client: int) -> Path:
        return self.folder / client_folder(client) / "own"


class Kept(dict[int, ClientModel]):
    """Models by client id, which are few and kept, as they may hold connections; see `host.Models`."""

    writes = True

    @property
    def first_adapter(self) -> Adapter:
        """None: they exchange no weights."""
        return {}
