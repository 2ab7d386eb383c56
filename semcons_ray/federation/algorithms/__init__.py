"""The algorithms, each in a file: what a client does on a visit, and what the server does in a round.

Each is a line of `parts.table`. Its class gets by name those of the following that its constructor has parameters for,
and its options, which are its further parameters:

    cohort                who takes part in each round
    ranks                 LoRA rank of each client, (C,)
    num_rounds            rounds of the run
    exchanges             rounds in which clients answer the public prompts
    ema_decay             weight of a client's old adapter in its moving average
    label_weight          weight of a pseudo-label in the loss, where a private example has 1
    self_labels           whether clients also train on their own answers to the public prompts
    self_training         whether each client learns its own answers, and nothing is exchanged
    dtype, compression    of messages

What an algorithm can be combined with it says by class variables, all of which are false if they are not there:

    any_models            clients may have models of different architectures, as no weights are exchanged; only then do
                          clients keep a moving average, and may be of kinds that have no weights to send
    any_ranks             clients may have different LoRA ranks
    exchanges_tokens      clients send token probabilities, which the server averages: they have one model, but each
                          its own adapter, with a moving average
    averages_weights      clients send adapter weights, which the server averages
    own_models            each client has a model of its own, though weights are averaged
    outgrows_ranks        what is added to a client's base model is of a higher rank each round
    forms_consensus       the server elects an answer to each public prompt
    factors_only          it is defined by products of A and B, or by one of them, and knows no other tensors
    adjusts_gradients     it changes gradients before each step
    can_hear_late         answers may count in a later round than that in which their client was asked
"""

from typing import Any

from semcons_ray.config import AlgorithmConfig
from semcons_ray.federation.fleet import Algorithm
from semcons_ray.federation.randomness import Cohort
from semcons_ray.parts import build


def build_algorithm(settings: AlgorithmConfig, cohort: Cohort, ranks: tuple[int, ...], num_rounds: int) -> Algorithm:
    """The algorithm that `algorithm.name` names.

    Args:
        settings: The section `algorithm`.
        cohort: Who takes part in each round.
        ranks: LoRA rank of each client, (C,).
        num_rounds: Rounds of the run.

    Raises:
        ConfigError: It has no such options, or refuses them.
    """
    offered: dict[str, Any] = {
        "cohort": cohort,
        "ranks": ranks,
        "num_rounds": num_rounds,
        "exchanges": settings.exchanges(num_rounds),
        "ema_decay": settings.moving_average,
        "label_weight": settings.pseudo_label_weight,
        "self_labels": settings.self_labels,
        "self_training": settings.rule == "own_answer",
        "dtype": settings.weight_dtype,
        "compression": settings.compression,
    }
    setting = "algorithm.options"
    algorithm: Algorithm = build(
        "algorithm", settings.name, settings.options_of_algorithm, setting=setting, offered=offered
    )
    return algorithm
