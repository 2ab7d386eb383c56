"""The search space of a sweep: settings by dotted key, the values that each may take, and the points to try."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from semcons_ray.config import (
    ExperimentConfig,
    Section,
    Settings,
    Source,
    Within,
    dump_yaml,
    find_setting,
    is_option,
    merge_settings,
    setting_value,
    typed,
    validate_config,
    validate_shared,
    with_engine,
    without_effect,
    without_settings,
)
from semcons_ray.errors import ConfigError
from semcons_ray.evaluation.metrics import find_metric, metrics_of
from semcons_ray.reporting.tables import describe_trial
from semcons_ray.runs.run_folder import comparable_loss
from semcons_ray.studies.batch import load_study, slug

LOSSES = ("bits_per_byte", "worst_bits_per_byte", "mean_nll", "worst_nll")

_OF_ANY_MODEL = {"mean_nll": "bits_per_byte", "worst_nll": "worst_bits_per_byte"}
"""For metrics that only compare trials of one model: the metric that compares any. For one model they rank alike."""

Point = dict[str, Any]
"""A value for each key that is swept."""


class Axis(Settings):
    """The values of one swept key; exactly one attribute is given.

    Attributes:
        grid: All of these values are tried, crossed with the other keys.
        choice: One of these values is drawn.
        uniform: A number between these two is drawn.
        loguniform: The same, but its logarithm is uniform.
        randint: An integer is drawn, from the first number up to, but without, the second.
    """

    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        given = [kind for kind in Axis.model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(Axis.model_fields)}")
        if (bounds := self.bounds) and not bounds[0] < bounds[1]:
            raise ValueError(f"{given[0]} needs a smaller number and a larger one")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs numbers over 0")
        texts = [label(value) for value in self.values]
        if len(set(texts)) < len(texts):
            raise ValueError(f"{given[0]} names a value twice")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of `grid` or `choice`; empty for a range."""
        return self.grid or self.choice or ()

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The two ends of a range; None for `grid` and `choice`."""
        return self.uniform or self.loguniform or self.randint

    def draw(self, random: np.random.Generator) -> Any:
        """Draw a value; None for a grid."""
        if self.choice:
            return self.choice[int(random.integers(len(self.choice)))]
        if self.uniform:
            return float(random.uniform(*self.uniform))
        if self.loguniform:
            low, high = self.loguniform
            return math.exp(random.uniform(math.log(low), math.log(high)))
        return int(random.integers(*self.randint)) if self.randint else None

    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all others when settings are checked."""
        return (self.randint[0], self.randint[1] - 1) if self.randint else self.values or self.bounds or ()


class AshaConfig(Settings):
    """Asynchronous successive halving (L. Li et al., arXiv:1810.05934): after `grace_rounds` rounds, and whenever a
    trial's rounds have multiplied by `reduction_factor`, it is stopped unless it is among the best 1/`reduction_factor`
    so far."""

    grace_rounds: int = Field(1, ge=1)
    reduction_factor: float = Field(2.0, gt=1)


class SweepConfig(Settings):
    """The settings of a sweep.

    Attributes:
        name: A title for the table and the report.
        experiment: Settings of all trials; what is left out has its default.
        space: By dotted key, the values to try.
        search: grid: every combination; random: `num_samples` draws, each crossed with the keys that have a grid;
            optuna: `num_samples` points, each chosen by the results of those before.
        num_samples: See `search`.
        seed: Seed of the search; the trials' own seed is `experiment.seed`, unless that is swept.
        metric: What ranks trials: bits per byte (mean over clients, or of the worst client), NLL in nats a token (only
            if all trials have one model), or the mean of any other of `evaluation.metrics`.
        scheduler: asha stops trials that fall behind; none lets all finish.
        asha: Settings of the scheduler asha.
        max_concurrent_trials: Most trials at a time; None: as many as the cluster has room for.
    """

    name: str = "sweep"
    experiment: Section = Field(default_factory=dict)
    space: dict[str, Axis] = Field(min_length=1)
    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(10, ge=1)
    seed: int = Field(0, ge=0)
    metric: str = "bits_per_byte"
    scheduler: Literal["none", "asha"] = "none"
    asha: AshaConfig = AshaConfig()
    max_concurrent_trials: int | None = Field(None, ge=1)

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return {key: _typed_axis(key, axis) for key, axis in _flatten(value)} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        for key, axis in self.space.items():
            _check_key(key)
            if self.search == "grid" and axis.grid is None:
                raise ValueError(f"space.{key}: search grid takes a grid; for draws, set search to random or optuna")
            if self.search == "optuna" and axis.grid is not None:
                raise ValueError(f"space.{key}: search optuna draws; write choice instead of grid")
        return self

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric is a score, of which more is better, and not a loss."""
        return self.metric not in LOSSES and not find_metric(self.metric).lower_is_better

    def points(self) -> list[Point]:
        """All points to try, in order; none for optuna, which chooses them as it goes.

        With more samples or values, the earlier points stay the same.
        """
        if self.search == "optuna":
            return []
        grids = {key: axis.values for key, axis in self.space.items() if axis.grid}
        drawn = {key: axis for key, axis in self.space.items() if not axis.grid}
        points: dict[str, Point] = {}
        for sample in range(self.num_samples if drawn else 1):
            random = np.random.default_rng([self.seed, sample])
            draws = {key: axis.draw(random) for key, axis in drawn.items()}
            for values in itertools.product(*grids.values()):
                point = {**draws, **dict(zip(grids, values, strict=True))}
                point = {key: point[key] for key in self.space}
                points.setdefault(trial_name(point), point)
        return list(points.values())

    def configure(self, point: Point) -> ExperimentConfig:
        """The settings of the trial at a point.

        Raises:
            ConfigError: They are refused; the message names the point and the key.
        """
        where = f"space ({describe_point(point)})"
        shared, own = self._settings(point)
        config = validate_config(merge_settings(shared, own), where=where, shared=shared)
        # A trial's bundles are for workers. Ranks and engines would book room outside them, and could wait for ever.
        if config.sharding.models:
            raise ConfigError(f"{where}: sharding.models is not for sweeps")
        if config.generation.engine == "vllm" and config.resources.fleet == "ray":
            raise ConfigError(f"{where}: generation.engine vllm needs resources.fleet local in a sweep")
        if point.get("generation.engine") == "auto":
            raise ConfigError(f"{where}: generation.engine auto is always transformers in a sweep; name the engine")
        return with_engine(config, "transformers") if config.generation.engine == "auto" else config

    def first(self) -> Point:
        """One point of the space: the first value of each key."""
        return {key: axis.extremes()[0] for key, axis in self.space.items()}

    def tried(self) -> list[Point]:
        """Points that stand for all: those that are known, and the ends or values of what is drawn."""
        ends = [
            self.first() | {key: value}
            for key, axis in self.space.items()
            for value in (axis.extremes() if axis.grid is None else ())
        ]
        return [*self.points(), *ends]

    def point_of(self, config: ExperimentConfig) -> Point | None:
        """The point to which settings belong; None if it is not in the space."""
        point: Point = {}
        for key, axis in self.space.items():
            value = typed(key, setting_value(config, key))
            if not (axis.bounds[0] <= value <= axis.bounds[1] if axis.bounds else value in axis.values):
                return None
            point[key] = value
        return point

    def check(self) -> None:
        """Check that all points and the ends of ranges give valid settings, and that the metric can compare the trials.

        Raises:
            ConfigError: They do not, or it cannot; the message names the key.
        """
        validate_shared(self.experiment, where="experiment", shared=self.experiment)
        points = self.tried()
        configs = [self.configure(point) for point in points]
        for config in configs if self.metric not in LOSSES else ():
            known = [*LOSSES, *(key for key in metrics_of(config.evaluation.metrics) if key not in ("nll", *LOSSES))]
            if self.metric not in known:
                raise ConfigError(
                    f"metric: {self.metric} is not measured in {config.name}; there are {', '.join(known)}, and others "
                    "if they are added to experiment.evaluation.metrics"
                )
        told = [config.scored_models for config in configs]
        models = sorted({model for of_point in told for model in of_point})
        if self.metric in LOSSES and not all(told):
            raise ConfigError(
                f"metric: {self.metric} needs likelihoods, and no client's model tells them in some trial; set metric "
                "to rouge_l or similarity"
            )
        if self.metric in _OF_ANY_MODEL and comparable_loss(models) != "nll":
            raise ConfigError(
                f"metric: {self.metric} is in nats a token, and the tokens of {' and '.join(models)} differ; "
                f"set metric to {_OF_ANY_MODEL[self.metric]}"
            )
        idle = [set(self._idle(point)) for point in points]
        if unused := set.intersection(*idle):
            raise ConfigError(f"experiment: {', '.join(sorted(unused))} has no effect in any trial")

    def _settings(self, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings that a trial shares with the others, and its own."""
        own = nested(point)
        shared = without_settings(self.experiment, own)
        differing = {key: value for key, value in point.items() if len(self.space[key].values) != 1}
        return shared, {**own, "name": describe_trial(differing or point)}

    def _idle(self, point: Point) -> Iterator[str]:
        """Shared settings that have no effect in a trial."""
        shared, own = self._settings(point)
        values = merge_settings(shared, own)
        return (key for key, _ in without_effect(validate_shared(values, where="space", shared=shared)))


def load_sweep(source: Source, overrides: dict[str, Any] | None = None) -> SweepConfig:
    """Read a sweep and check all its points; see `batch.load_study`.

    Args:
        source: Where settings are read from.
        overrides: Settings that replace those of the experiment.

    Raises:
        ConfigError: A file is missing or not YAML, or a key or value is refused; the message names the key.
    """
    sweep = load_study(SweepConfig, source, overrides)
    sweep.check()
    return sweep


def dump_sweep(sweep: SweepConfig) -> str:
    """The sweep as YAML that `load_sweep` reads, with every default of the experiment written out."""
    values = sweep.model_dump(mode="json")
    values["space"] = {
        key: {kind: given for kind, given in axis.items() if given is not None} for key, axis in values["space"].items()
    }
    experiment = validate_shared(sweep.experiment, where="experiment", shared=sweep.experiment)
    values["experiment"] = experiment.model_dump(mode="json", exclude={"name"})
    return dump_yaml(values)


def nested(point: Point) -> dict[str, Any]:
    """Dotted keys as nested settings."""
    values: dict[str, Any] = {}
    for key, value in point.items():
        *sections, last = key.split(".")
        value = Within({last: value}) if is_option(key) else {last: value}
        for part in reversed(sections):
            value = {part: value}
        values = merge_settings(values, value)
    return values


def label(value: Any) -> str:
    """A value as text; anything but a text or a float as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe_point(point: Point) -> str:
    """The point in one line, as key=value pairs."""
    return ", ".join(f"{key}={label(value)}" for key, value in point.items())


def trial_name(point: Point) -> str:
    """Name of the folder of a point's trial. It is the same for the same point, so a killed sweep finds its trials
    again."""
    short = ", ".join(f"{key.rsplit('.')[-1]}={label(value)}" for key, value in point.items())
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
    return f"{slug(short)[:60].rstrip('-.')}-{digest[:8]}"


def _flatten(space: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in space.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and value and not value.keys() & Axis.model_fields.keys():
            yield from _flatten(value, f"{key}.")
        elif isinstance(value, dict):
            yield key, value
        else:
            raise ValueError(f"space.{key}: values are given under {' or '.join(Axis.model_fields)}")


def _typed_axis(key: str, axis: dict[str, Any]) -> dict[str, Any]:
    """The axis with its values converted to the setting's type."""
    listed = {kind: axis[kind] for kind in ("grid", "choice") if isinstance(axis.get(kind), (list, tuple))}
    return axis | {kind: [typed(key, value) for value in values] for kind, values in listed.items()}


def _check_key(key: str) -> None:
    field = find_setting(key)
    if field is None and not is_option(key):
        raise ValueError(f"space.{key}: there is no such setting")
    if key == "name" or (field and isinstance(field.default, Settings)):
        raise ValueError(f"space.{key}: a single setting can be swept, such as prompts.budget")
