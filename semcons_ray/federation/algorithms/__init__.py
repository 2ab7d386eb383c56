"""One algorithm a file: what a client does on a visit, and what the server does with a round of visits."""

from semcons_ray.config import AlgorithmConfig
from semcons_ray.federation.algorithms.local_only import LocalOnly
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.fleet import Algorithm
from semcons_ray.federation.randomness import Cohort

__all__ = ["LocalOnly", "SemanticConsensus", "build_algorithm"]


def build_algorithm(settings: AlgorithmConfig, cohort: Cohort) -> Algorithm:
    """The algorithm that `algorithm.name` names."""
    match settings.name:
        case "semantic_consensus":
            return SemanticConsensus(cohort, settings.pseudo_label_weight, settings.compression)
        case "local_only":
            return LocalOnly(cohort)
