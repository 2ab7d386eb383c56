"""A consensus for every prompt: chunks of prompts go through a rule together.

Legend: C clients, P prompts, D embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from semcons_ray.consensus import rules
from semcons_ray.errors import ConfigError

NORM_TOLERANCE = 1e-2
"""What rounding to half precision may do to the length of a unit vector."""


@dataclass(frozen=True)
class Consensus:
    """The elected answers, on the device of the embeddings.

    Attributes:
        winner: Client whose answer was elected, (P,) int64; -1 where nobody answered.
        agreement: Similarity of the winner's answer, whatever the rule, (P,) float32; NaN where nobody answered.
        similarity: Mean cosine of an answer to the others that are there, (P, C) float32; NaN where it is missing. An
            answer that is alone agrees with itself: 1.
        abstained: Prompts that give no pseudo-label: nobody answered, or agreement is under the threshold, (P,) bool.
    """

    winner: Tensor
    agreement: Tensor
    similarity: Tensor
    abstained: Tensor


@torch.no_grad()
def form_consensus(
    embeddings: Tensor,
    mask: Tensor,
    *,
    rule: str,
    threshold: float = 0.0,
    plurality_similarity: float = 0.8,
    trim: float = 0.2,
    num_byzantine: int = 1,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
    generator: np.random.Generator | None = None,
    chunk_bytes: int | None = None,
) -> Consensus:
    """Elect one answer a prompt.

    Ties go to the lowest client index, and scores within 1e-6 are a tie, so that neither the order of arrival nor the
    rounding of a device decides between equal answers. The threshold has the same tolerance.

    The embeddings are only read, once, and may be larger than memory if they are memory-mapped. Working memory is a
    few times `chunk_bytes`, or what one prompt takes, if that is more: C D float32 values, and C for the rules that
    compare all pairs.

    Args:
        embeddings: Unit vectors of the answers, (P, C, D), floating point; computed with in float32. Rows of missing
            answers are not looked at.
        mask: Which answers are there, (P, C) bool.
        rule: A name of `config.RuleName`; `consensus.rules` says what each does.
        threshold: Least agreement, in [-1, 1], for a prompt to give a pseudo-label.
        plurality_similarity: Cosine, in [-1, 1], at which two answers are one opinion, for plurality.
        trim: Share of answers dropped, in [0, 0.5), for trimmed.
        num_byzantine: Bad clients expected, for multi_krum.
        weights: Of the clients, (C,), not negative, for weighted_medoid.
        lengths: Characters of each answer, (P, C), for longest and shortest.
        generator: For random_client, which draws one number a prompt.
        chunk_bytes: Memory that a chunk of prompts may take; None: what stays in a CPU's cache (so that a chunk is
            read from memory once, however often a rule goes over it), and 256 MiB on a GPU.

    Raises:
        ConfigError: A setting is unknown or out of range.
        ValueError: A tensor is missing, has the wrong shape or type, or is not of unit rows.
    """
    if not -1 <= threshold <= 1:
        raise ConfigError(f"algorithm.agreement_threshold must be in [-1, 1], not {threshold}")
    chunk_bytes = chunk_bytes or (2**21 if embeddings.device.type == "cpu" else 2**28)
    score = _rule(rule, plurality_similarity, trim, num_byzantine, chunk_bytes)
    _check(embeddings, mask, rule, weights, lengths, generator)
    num_prompts, num_clients, dimension = embeddings.shape
    device = embeddings.device
    mask = mask.to(device)
    if weights is not None:
        weights = weights.to(device, torch.float32)
    draws = generator.random(num_prompts) if rule == "random_client" and generator else np.zeros(num_prompts)
    draw = torch.from_numpy(draws).to(device)

    winner = torch.full((num_prompts,), -1, device=device)
    similarity = torch.full((num_prompts, num_clients), torch.nan, device=device)
    num_together = max(1, chunk_bytes // max(4 * num_clients * dimension, 1))
    for start in range(0, num_prompts, num_together):
        here = slice(start, start + num_together)
        present = mask[here]
        answers = embeddings[here].to(torch.float32)
        if not bool(present.all()):
            answers = answers.where(present[:, :, None], 0.0)
        squares = _squared_norms(answers, present, start)
        cosines = _mean_cosine_to_others(answers, present, squares)
        ballots = rules.Ballots(
            answers, present, cosines, weights, None if lengths is None else lengths[here].to(device), draw[here]
        )
        elected = rules.elect(score(ballots).where(present, -torch.inf))
        winner[here] = elected.where(present.any(dim=1), -1)
        similarity[here] = cosines.where(present, torch.nan)

    agreement = similarity.gather(1, winner.clamp(min=0)[:, None]).squeeze(1).where(winner >= 0, torch.nan)
    return Consensus(winner, agreement, similarity, abstained=~(agreement >= threshold - rules.TOLERANCE))


def _mean_cosine_to_others(answers: Tensor, present: Tensor, squares: Tensor) -> Tensor:
    """(e_i . sum_j e_j - |e_i|^2) / (n - 1), (p, C); no C x C matrix is needed. 1 for an answer that is alone."""
    others = present.sum(dim=1, keepdim=True) - 1
    totals = answers.sum(dim=1)
    sums = torch.bmm(answers, totals[:, :, None]).squeeze(2) - squares
    return torch.where(others > 0, sums / others.clamp(min=1), 1.0)


def _squared_norms(answers: Tensor, present: Tensor, start: int) -> Tensor:
    squares = torch.linalg.vector_norm(answers, dim=2).square()
    off = ((squares - 1).abs() > 2 * NORM_TOLERANCE) & present  # a NaN is caught below: it makes the sum a NaN
    if bool(off.any()) or not bool(squares.sum().isfinite()):
        prompt, client = (off | squares.isnan()).nonzero()[0].tolist()
        length = float(squares[prompt, client].sqrt())
        raise ValueError(f"embedding of prompt {start + prompt}, client {client} has length {length:.3g}, not 1")
    return squares


def _rule(
    name: str, plurality_similarity: float, trim: float, num_byzantine: int, chunk_bytes: int
) -> rules.Rule:
    if not -1 <= plurality_similarity <= 1:
        raise ConfigError(f"algorithm.plurality_similarity must be in [-1, 1], not {plurality_similarity}")
    if not 0 <= trim < 0.5:
        raise ConfigError(f"algorithm.trim must be in [0, 0.5), not {trim}")
    if num_byzantine < 0:
        raise ConfigError(f"algorithm.num_byzantine must not be negative, not {num_byzantine}")
    known: dict[str, rules.Rule] = {
        "medoid": rules.medoid,
        "plurality": partial(rules.plurality, min_cosine=plurality_similarity, block_bytes=chunk_bytes),
        "weighted_medoid": rules.weighted_medoid,
        "geometric_median": rules.geometric_median,
        "trimmed": partial(rules.trimmed, trim=trim),
        "multi_krum": partial(rules.multi_krum, num_byzantine=num_byzantine, block_bytes=chunk_bytes),
        "random_client": rules.random_client,
        "longest": rules.longest,
        "shortest": rules.shortest,
    }
    if name not in known:
        raise ConfigError(f"algorithm.rule is {name!r}; known rules: {', '.join(known)}")
    return known[name]


def _check(
    embeddings: Tensor,
    mask: Tensor,
    rule: str,
    weights: Tensor | None,
    lengths: Tensor | None,
    generator: np.random.Generator | None,
) -> None:
    if embeddings.ndim != 3 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be (P, C, D) and floating point, not {_describe(embeddings)}")
    if mask.shape != embeddings.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(embeddings.shape[:2])}, not {_describe(mask)}")
    if rule == "weighted_medoid":
        if weights is None or weights.shape != embeddings.shape[1:2]:
            raise ValueError(f"rule {rule} needs weights of shape ({embeddings.shape[1]},), not {_describe(weights)}")
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError("weights must be finite and not negative")
    if rule in ("longest", "shortest") and (lengths is None or lengths.shape != mask.shape):
        raise ValueError(f"rule {rule} needs lengths of shape {tuple(mask.shape)}, not {_describe(lengths)}")
    if rule == "random_client" and generator is None:
        raise ValueError("rule random_client needs a generator")


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
