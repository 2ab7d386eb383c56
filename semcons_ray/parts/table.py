"""The parts that come with semcons_ray: for each kind a name and the object that it stands for, as `module:object`.

To add one, write it in a file and add its line here. Packages add theirs by entry points of the groups in `GROUPS`.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "algorithm",
    "rule",
    "competence",
    "defence",
    "attack",
    "client",
    "partition",
    "selection",
    "metric",
    "embedder",
    "reader",
    "tracker",
    "availability",
    "policy",
]
"""What can be named in the settings and replaced by an object of one's own."""

BUILT_IN: dict[Kind, dict[str, str]] = {
    "algorithm": {
        "semantic_consensus": "semcons_ray.federation.algorithms.semantic_consensus:SemanticConsensus",
        "logit_exchange": "semcons_ray.federation.algorithms.logit_exchange:LogitExchange",
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
        "fedavgm": "semcons_ray.federation.algorithms.fedavgm:FedAvgM",
        "fedadam": "semcons_ray.federation.algorithms.fedadam:FedAdam",
        "fedex_lora": "semcons_ray.federation.algorithms.fedex_lora:FedExLora",
        "fedsa_lora": "semcons_ray.federation.algorithms.fedsa_lora:FedSaLora",
    },
    "rule": {
        "medoid": "semcons_ray.consensus.rules:medoid",
        "plurality": "semcons_ray.consensus.rules:plurality",
        "mode": "semcons_ray.consensus.rules:mode",
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
    "competence": {
        "equal": "semcons_ray.consensus.evidence:equal",
        "expertise": "semcons_ray.consensus.competence:expertise",
        "sentinels": "semcons_ray.consensus.competence:sentinels",
    },
    "defence": {
        "none": "semcons_ray.consensus.evidence:no_defence",
        "independent": "semcons_ray.consensus.defence:Independent",
    },
    "attack": {
        "harmless": "semcons_ray.security.attacks:harmless",
        "one_text": "semcons_ray.security.attacks:one_text",
        "echo": "semcons_ray.security.attacks:echo",
        "least_likely": "semcons_ray.security.attacks:least_likely",
        "hub": "semcons_ray.security.attacks:hub",
        "label_flip": "semcons_ray.security.attacks:label_flip",
        "backdoor": "semcons_ray.security.attacks:Backdoor",
        "sleeper": "semcons_ray.security.attacks:Sleeper",
        "adaptive": "semcons_ray.security.attacks:adaptive",
    },
    "client": {
        "openai": "semcons_ray.endpoints.api_model:ApiModel",
    },
    "partition": {
        "iid": "semcons_ray.data.partition:iid",
        "dirichlet": "semcons_ray.data.partition:dirichlet",
        "category": "semcons_ray.data.partition:by_category",
        "quantity": "semcons_ray.data.partition:quantity",
        "natural": "semcons_ray.data.partition:natural",
    },
    "selection": {
        "random": "semcons_ray.data.selection:first",
        "stratified": "semcons_ray.data.selection:stratified",
        "k_center": "semcons_ray.data.selection:k_center",
    },
    "metric": {
        "nll": "semcons_ray.evaluation.metrics:NLL",
        "bits_per_byte": "semcons_ray.evaluation.metrics:BITS_PER_BYTE",
        "rouge_l": "semcons_ray.evaluation.metrics:ROUGE_L",
        "similarity": "semcons_ray.evaluation.metrics:SIMILARITY",
        "exact_match": "semcons_ray.evaluation.metrics:EXACT_MATCH",
        "numeric_match": "semcons_ray.evaluation.metrics:NUMERIC_MATCH",
        "chrF": "semcons_ray.evaluation.metrics:CHRF",
        "judge": "semcons_ray.evaluation.metrics:JUDGE",
        "multiple_choice": "semcons_ray.evaluation.metrics:MULTIPLE_CHOICE",
    },
    "embedder": {"sentence_transformers": "semcons_ray.modeling.embedding:Embedder"},
    "reader": {},  # what is read without one goes by a source's name, see data.sources
    "tracker": {
        "tensorboard": "semcons_ray.tracking.trackers:TensorBoard",
        "wandb": "semcons_ray.tracking.trackers:Wandb",
        "mlflow": "semcons_ray.tracking.trackers:Mlflow",
        "trackio": "semcons_ray.tracking.trackers:Trackio",
    },
    "availability": {
        "always": "semcons_ray.timeline.availability:Always",
        "diurnal": "semcons_ray.timeline.availability:Diurnal",
        "trace": "semcons_ray.timeline.availability:Trace",
    },
    "policy": {
        "synchronous": "semcons_ray.timeline.policies:Synchronous",
        "deadline": "semcons_ray.timeline.policies:Deadline",
        "semi_async": "semcons_ray.timeline.policies:SemiAsync",
        "async": "semcons_ray.timeline.policies:Async",
    },
}

PROTOCOLS: dict[Kind, str] = {
    "algorithm": "semcons_ray.federation.fleet:Algorithm",
    "rule": "semcons_ray.consensus.rules:Rule",
    "competence": "semcons_ray.consensus.evidence:Competence",
    "defence": "semcons_ray.consensus.evidence:Defence",
    "attack": "semcons_ray.security.attacks:Attack",
    "client": "semcons_ray.modeling.client_model:ClientModel",
    "partition": "semcons_ray.data.partition:Partition",
    "selection": "semcons_ray.data.selection:Selection",
    "metric": "semcons_ray.evaluation.metrics:AnswerMetric",
    "embedder": "semcons_ray.federation.server:TextEmbedder",
    "reader": "semcons_ray.data.sources:Reader",
    "tracker": "semcons_ray.tracking.trackers:Tracker",
    "availability": "semcons_ray.timeline.availability:Availability",
    "policy": "semcons_ray.timeline.policies:Policy",
}
"""The Protocol that parts of each kind are to fit."""

OFFERED: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(BUILT_IN, ()),
    "algorithm": (
        *("cohort", "ranks", "num_rounds", "exchanges", "ema_decay", "label_weight", "self_labels", "self_training"),
        *("dtype", "compression"),
    ),
    "client": ("name", "client_id", "seed", "embedding_model", "folder", "system_prompt"),
    "embedder": ("device",),
    "tracker": ("subject", "past"),
}
"""What classes of each kind get by name where they have parameters for it, and so are no options of theirs."""

ON_WORKERS: tuple[Kind, ...] = ("algorithm", "rule", "competence", "defence", "embedder", "client")
"""Kinds of which workers or the server, which may be other processes, need the code; the others work on the driver."""



def plural(kind: str) -> str:
    """The word for several parts of a kind."""
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


GROUPS: dict[Kind, str] = {kind: f"semcons_ray.{plural(kind)}" for kind in BUILT_IN}
"""Groups of entry points by which installed packages name parts of their own."""
