"""Federated fine-tuning of language models by semantic consensus, simulated on Ray.

    import semcons_ray as sr

    run = sr.run({"num_rounds": 2}, out="runs/first")
    run.metrics

Every public name is imported from here, though it says of itself in which module it is defined. That module is imported
when the name is first used, so this package itself loads neither torch nor Ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from semcons_ray.api.doctor import Check, diagnose
    from semcons_ray.api.experiments import (
        attack,
        audit,
        break_even,
        compare,
        evaluate,
        labels,
        load,
        plan,
        replay,
        resume,
        run,
        sweep,
        watch,
    )
    from semcons_ray.api.results import Comparison, DryRun, Run, Sweep
    from semcons_ray.config import ExperimentConfig, FederationConfig
    from semcons_ray.consensus.evidence import Competence, Defence, Evidence, Ruling
    from semcons_ray.consensus.rules import Ballots, Rule
    from semcons_ray.data.partition import Partition
    from semcons_ray.data.selection import Selection
    from semcons_ray.data.sources import Reader
    from semcons_ray.errors import (
        ClientError,
        ConfigError,
        DataError,
        EngineError,
        MessageError,
        ModelError,
        NotFiniteError,
        PlacementError,
        QuorumError,
        RunFolderError,
        SemconsError,
        StorageError,
        UnansweredError,
        UserError,
    )
    from semcons_ray.evaluation.metrics import AnswerMetric
    from semcons_ray.federation.client import Client
    from semcons_ray.federation.fleet import Algorithm, Reply, RoundOutcome, Visitor
    from semcons_ray.federation.server import ServerProtocol, TextEmbedder
    from semcons_ray.modeling.client_model import ClientModel
    from semcons_ray.reporting.progress import Progress
    from semcons_ray.runs.observers import Observer
    from semcons_ray.runs.run_folder import Commit
    from semcons_ray.security.attacks import Attack, Scene
    from semcons_ray.security.audit import Audit
    from semcons_ray.studies.attacks import Attacks
    from semcons_ray.studies.break_even import BreakEven
    from semcons_ray.studies.comparison import ComparisonConfig
    from semcons_ray.studies.labels import Labels
    from semcons_ray.studies.replays import Replays
    from semcons_ray.studies.search_space import SweepConfig
    from semcons_ray.timeline.availability import Availability
    from semcons_ray.timeline.policies import Policy
    from semcons_ray.tracking.trackers import Tracker

__all__ = [
    "Algorithm",
    "AnswerMetric",
    "Attack",
    "Attacks",
    "Audit",
    "Availability",
    "Ballots",
    "BreakEven",
    "Check",
    "Client",
    "ClientError",
    "ClientModel",
    "Commit",
    "Comparison",
    "ComparisonConfig",
    "Competence",
    "ConfigError",
    "DataError",
    "Defence",
    "DryRun",
    "EngineError",
    "Evidence",
    "ExperimentConfig",
    "FederationConfig",
    "Labels",
    "MessageError",
    "ModelError",
    "NotFiniteError",
    "Observer",
    "Partition",
    "PlacementError",
    "Policy",
    "Progress",
    "QuorumError",
    "Reader",
    "Replays",
    "Reply",
    "RoundOutcome",
    "Rule",
    "Ruling",
    "Run",
    "RunFolderError",
    "Scene",
    "Selection",
    "SemconsError",
    "ServerProtocol",
    "StorageError",
    "Sweep",
    "SweepConfig",
    "TextEmbedder",
    "Tracker",
    "UnansweredError",
    "UserError",
    "Visitor",
    "__version__",
    "attack",
    "audit",
    "break_even",
    "compare",
    "diagnose",
    "evaluate",
    "labels",
    "load",
    "plan",
    "replay",
    "resume",
    "run",
    "sweep",
    "watch",
]

_HOMES = {
    "semcons_ray.api.doctor": ("Check", "diagnose"),
    "semcons_ray.api.experiments": (
        *("attack", "audit", "break_even", "compare", "evaluate", "labels", "load", "plan"),
        *("replay", "resume", "run", "sweep", "watch"),
    ),
    "semcons_ray.api.results": ("Comparison", "DryRun", "Run", "Sweep"),
    "semcons_ray.config": ("ExperimentConfig", "FederationConfig"),
    "semcons_ray.consensus.evidence": ("Competence", "Defence", "Evidence", "Ruling"),
    "semcons_ray.consensus.rules": ("Ballots", "Rule"),
    "semcons_ray.data.partition": ("Partition",),
    "semcons_ray.data.selection": ("Selection",),
    "semcons_ray.data.sources": ("Reader",),
    "semcons_ray.evaluation.metrics": ("AnswerMetric",),
    "semcons_ray.federation.client": ("Client",),
    "semcons_ray.federation.fleet": ("Algorithm", "Reply", "RoundOutcome", "Visitor"),
    "semcons_ray.federation.server": ("ServerProtocol", "TextEmbedder"),
    "semcons_ray.modeling.client_model": ("ClientModel",),
    "semcons_ray.reporting.progress": ("Progress",),
    "semcons_ray.runs.observers": ("Observer",),
    "semcons_ray.runs.run_folder": ("Commit",),
    "semcons_ray.security.attacks": ("Attack", "Scene"),
    "semcons_ray.security.audit": ("Audit",),
    "semcons_ray.studies.attacks": ("Attacks",),
    "semcons_ray.studies.break_even": ("BreakEven",),
    "semcons_ray.studies.comparison": ("ComparisonConfig",),
    "semcons_ray.studies.labels": ("Labels",),
    "semcons_ray.studies.replays": ("Replays",),
    "semcons_ray.studies.search_space": ("SweepConfig",),
    "semcons_ray.timeline.availability": ("Availability",),
    "semcons_ray.timeline.policies": ("Policy",),
    "semcons_ray.tracking.trackers": ("Tracker",),
}
"""Where names are defined that are not errors."""


if not TYPE_CHECKING:  # a type checker would take it for any name

    def __getattr__(name: str) -> Any:
        """A public name, from the module in which it is defined."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = next((module for module, names in _HOMES.items() if name in names), "semcons_ray.errors")
        value = globals()[name] = getattr(importlib.import_module(home), name)
        return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
