"""The parts that come with semcons_ray: for each kind a name and the object that it stands for, as `module:object`.

To add one, write it in a file and add its line here. Packages add theirs by entry points of the groups in `GROUPS`.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["algorithm", "rule", "client"]
"""What can be named in the settings and replaced by an object of one's own."""

BUILT_IN: dict[Kind, dict[str, str]] = {
    "algorithm": {
        "semantic_consensus": "semcons_ray.federation.algorithms.semantic_consensus:SemanticConsensus",
        "local_only": "semcons_ray.federation.algorithms.local_only:LocalOnly",
        "centralized": "semcons_ray.federation.algorithms.centralized:Centralized",
        "fedavg_lora": "semcons_ray.federation.algorithms.fedavg_lora:FedAvgLora",
        "one_shot_fedavg_lora": "semcons_ray.federation.algorithms.one_shot_fedavg_lora:OneShotFedAvgLora",
        "fedprox": "semcons_ray.federation.algorithms.fedprox:FedProx",
        "scaffold": "semcons_ray.federation.algorithms.scaffold:Scaffold",
        "ffa_lora": "semcons_ray.federation.algorithms.ffa_lora:FfaLora",
        "flora": "semcons_ray.federation.algorithms.flora:Flora",
        "flexlora": "semcons_ray.federation.algorithms.flexlora:FlexLora",
        "hetlora": "semcons_ray.federation.algorithms.hetlora:HetLora",
    },
    "rule": {
        "medoid": "semcons_ray.consensus.rules:medoid",
        "plurality": "semcons_ray.consensus.rules:plurality",
        "weighted_medoid": "semcons_ray.consensus.rules:weighted_medoid",
        "geometric_median": "semcons_ray.consensus.rules:geometric_median",
        "trimmed": "semcons_ray.consensus.rules:trimmed",
        "multi_krum": "semcons_ray.consensus.rules:multi_krum",
        "random_client": "semcons_ray.consensus.rules:random_client",
        "longest": "semcons_ray.consensus.rules:longest",
        "shortest": "semcons_ray.consensus.rules:shortest",
        # With these two the labels are not what is elected; the medoid still is, to measure how far clients agree.
        "reference": "semcons_ray.consensus.rules:medoid",
        "own_answer": "semcons_ray.consensus.rules:medoid",
    },
    "client": {
        "openai": "semcons_ray.endpoints.api_model:ApiModel",
    },
}

PROTOCOLS: dict[Kind, str] = {
    "algorithm": "semcons_ray.federation.fleet:Algorithm",
    "rule": "semcons_ray.consensus.rules:Rule",
    "client": "semcons_ray.modeling.client_model:ClientModel",
}
"""The Protocol that parts of each kind are to fit."""

GROUPS: dict[Kind, str] = {kind: f"semcons_ray.{kind}s" for kind in BUILT_IN}
"""Groups of entry points by which installed packages name parts of their own."""
