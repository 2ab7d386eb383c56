"""One algorithm a file: what a client does on a visit, and what the server does with a round of visits."""

from semcons_ray.config import AlgorithmConfig
from semcons_ray.federation.algorithms.local_only import LocalOnly
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.fleet import Algorithm

__all__ = ["LocalOnly", "SemanticConsensus", "build_algorithm"]


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` names."""
    if config.name == "local_only":
        return LocalOnly()
    return SemanticConsensus(pseudo_label_weight=config.pseudo_label_weight, compression=config.compression)
