"""The algorithms, each in a file: what a client does on a visit, and what the server does in a round."""

from semcons_ray.config import AlgorithmConfig
from semcons_ray.federation.algorithms.centralized import Centralized
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.algorithms.fedprox import FedProx
from semcons_ray.federation.algorithms.ffa_lora import FfaLora
from semcons_ray.federation.algorithms.flexlora import FlexLora
from semcons_ray.federation.algorithms.flora import Flora
from semcons_ray.federation.algorithms.hetlora import HetLora
from semcons_ray.federation.algorithms.local_only import LocalOnly
from semcons_ray.federation.algorithms.one_shot_fedavg_lora import OneShotFedAvgLora
from semcons_ray.federation.algorithms.scaffold import Scaffold
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.fleet import Algorithm
from semcons_ray.federation.randomness import Cohort

__all__ = [
    "Centralized",
    "FedAvgLora",
    "FedProx",
    "FfaLora",
    "FlexLora",
    "Flora",
    "HetLora",
    "LocalOnly",
    "OneShotFedAvgLora",
    "Scaffold",
    "SemanticConsensus",
    "build_algorithm",
]

AVERAGING = {"fedavg_lora": FedAvgLora, "scaffold": Scaffold, "ffa_lora": FfaLora, "flora": Flora,
             "flexlora": FlexLora, "hetlora": HetLora}  # fmt: skip


def build_algorithm(settings: AlgorithmConfig, cohort: Cohort, ranks: tuple[int, ...], num_rounds: int) -> Algorithm:
    """The algorithm that `algorithm.name` names.

    Args:
        settings: The section `algorithm`.
        cohort: Who takes part in each round.
        ranks: LoRA rank of each client, (C,).
        num_rounds: Rounds of the run.
    """
    exchanges, decay = settings.exchanges(num_rounds), settings.moving_average
    averaging = (
        cohort,
        ranks,
        settings.weight_dtype,
        settings.compression,
        settings.self_labels,
        settings.pseudo_label_weight,
        exchanges,
    )
    match settings.name:
        case "semantic_consensus":
            return SemanticConsensus(
                cohort,
                settings.pseudo_label_weight,
                settings.compression,
                exchanges,
                decay,
                self_training=settings.rule == "own_answer",
            )
        case "local_only":
            return LocalOnly(cohort, decay)
        case "centralized":
            return Centralized(cohort)
        case "fedprox":
            return FedProx(*averaging, mu=settings.proximal_mu)
        case "one_shot_fedavg_lora":
            return OneShotFedAvgLora(*averaging, num_rounds=num_rounds)
        case name:
            return AVERAGING[name](*averaging)
