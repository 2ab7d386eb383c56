"""A run's virtual clock, from its settings, its models' sizes and its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.examples import Example
from semcons_ray.data.split import DataSplit
from semcons_ray.errors import ConfigError
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.virtual_time import VirtualTime
from semcons_ray.messages import text_of
from semcons_ray.timeline.clock import Clock
from semcons_ray.timeline.devices import Model
from semcons_ray.timeline.federation import Federation
from semcons_ray.timeline.work import Visit, tokens_of


@dataclass(frozen=True)
class ClientModels:
    """Each client's model, by client id, from ranges of clients that have the same."""

    clients: Mapping[str, range]
    models: Mapping[str, Model]

    def __getitem__(self, client_id: int, /) -> Model | None:
        """The client's model; None: its answers are computed elsewhere, behind an endpoint."""
        for name, clients in self.clients.items():
            if client_id in clients:
                return self.models.get(name)
        raise KeyError(client_id)


def make_clock(config: ExperimentConfig, models: Mapping[str, Model], example_tokens: float) -> Clock:
    """The clock of `config.federation`, at the begin of round 1.

    Args:
        config: The settings.
        models: Sizes of the clients' models by name; see `assembly.model_sizes`.
        example_tokens: Tokens of an example, on average; see `tokens_of_example`.

    Raises:
        ConfigError: A name in the section federation is not known, a model does not fit on a device, or nobody is ever
            there.
    """
    federation = Federation.of(config.federation)
    clients = config.clients_with()
    if federation.model:
        models = dict.fromkeys(config.open_models, federation.model)
    return federation.clock(
        config.clients.num_clients,
        config.seed,
        ClientModels(clients, models),
        batch_size=config.generation.batch_size,
        step_tokens=config.training.batch_size * example_tokens,
    )


def check_federation(config: ExperimentConfig, models: Mapping[str, Model], split: DataSplit, cohort: Cohort) -> None:
    """Check, before any work, that a round can have an answer in it.

    Raises:
        ConfigError: See `make_clock`; or nobody can be in time, even if training were all that a visit takes.
    """
    epochs = 1 if config.training.local_steps else config.training.local_epochs
    asked = cohort.sample(1)
    least = [Visit(client, 1, 0, epochs * tokens_of(texts(split.private[client])), 0, 0, 1) for client in asked]
    example_tokens = tokens_of_example(split)
    if not make_clock(config, models, example_tokens).round(1, least).arrived:
        patient = config.federation.model_copy(update={"policy": "synchronous", "policy_options": {}})
        clock = make_clock(config.model_copy(update={"federation": patient}), models, example_tokens)
        clock.round(1, least)
        soonest = clock.visits().query("counted_in == 1")["ended_at"].min() / 3600
        when = "ever" if math.isnan(soonest) else f"before {soonest:.2g} hours"
        raise ConfigError(
            f"federation.policy {config.federation.policy}: by its device and link no client of round 1 would answer "
            f"{when}; change federation.policy_options, federation.dropout or federation.availability"
        )


def tokens_of_example(split: DataSplit) -> float:
    """About how many tokens an example has, prompt and response, by those of the test set."""
    return max(tokens_of(texts(split.test)) / len(split.test), 1.0)


def texts(examples: Sequence[Example]) -> list[str]:
    """Prompts and responses."""
    return [text for example in examples for text in (text_of(example.prompt), example.response)]


def virtual_time(config: ExperimentConfig, models: Mapping[str, Model], split: DataSplit) -> VirtualTime:
    """The virtual time of a run, at the begin of round 1."""
    clock = make_clock(config, models, tokens_of_example(split))
    return VirtualTime(clock, tokens_of(text_of(example.prompt) for example in split.public))
