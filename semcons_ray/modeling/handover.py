"""Proof that an engine answers with the adapter that it was given.

An engine tells how likely it finds each token of its first answer. The worker's own model finds the same tokens as
likely with the adapter that was handed over, but for rounding. With the adapter before it, it does not: training
changes most of all what is answered. So an answer that is wanted anyway tells whether the new adapter is in use, for
two short passes through the worker's model, or for one if the adapter before is the same.

Of two adapters that hardly differ, such as one that has learnt nothing and the base model, nothing can be told. Then
only gross errors show: likelihoods that no rounding explains.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from semcons_ray.errors import EngineError
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.engine import Engine, EngineReply, EngineRequest

if TYPE_CHECKING:  # the driver sends what a worker is built from without loading transformers
    from semcons_ray.modeling.language_model import LanguageModel

NUM_TOLD = 1
"""Answers of a request by which an adapter is recognised."""

ROUNDING = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""Root mean square of what rounding does to a token's log-likelihood, in nats, by dtype, generously. With SmolLM2-135M
on a CPU, 0.01 to 0.17 were measured over single answers in bfloat16, 0.06 in the median, and under 0.00005 in float32.
float16, other models, and GPUs have not been measured."""

GROSS, APART = 5, 10
"""So many times the rounding is no rounding any more: over all tokens, and in the one direction in which two adapters
differ."""


class HandOver:
    """Hands adapters of the clients of one worker to an engine, and proves that it answers with each.

    Args:
        engine: The engine.
        base: The worker's own model.
    """

    def __init__(self, engine: Engine, base: LanguageModel) -> None:
        self.engine = engine
        self._base = base
        self._now = self._before = base.fresh_adapter()

    def ask(self, adapter: Adapter, request: EngineRequest) -> list[tuple[EngineReply, float]]:
        """Have the engine answer; if it does not with this adapter, hand it over once more.

        Args:
            adapter: The adapter.
            request: The request, which has it as files.

        Returns:
            The replies, of which the last counts, each with the seconds waited for it.

        Raises:
            EngineError: The engine broke, or answered twice otherwise than with this adapter.
        """
        self._before = self._now
        if not _are_equal(adapter, self._now):
            self._now = dict(adapter)
        request = replace(request, num_told=min(NUM_TOLD, len(request.prompts)))
        replies = list[tuple[EngineReply, float]]()
        for _ in range(2):
            asked = time.perf_counter()
            reply = self.engine.generate(request)
            replies.append((reply, time.perf_counter() - asked))
            fault = self._fault(request, reply)
            if fault is None:
                return replies
        raise EngineError(
            f"{reply.engine} does not answer with the adapter that it was given, also when that was handed over again: "
            f"{fault}; set generation.engine to transformers"
        )

    def _fault(self, request: EngineRequest, reply: EngineReply) -> str | None:
        """What speaks against the engine's having used the adapter; see `fault`."""
        if len(reply.told) != request.num_told:
            return f"it tells of {len(reply.told)} answers of {request.num_told} how likely they are"
        prompts, answers = request.prompts[: request.num_told], [told.ids for told in reply.told]
        by_engine = [*chain(*(told.log_likelihoods for told in reply.told))]
        now = [*chain(*self._base.log_likelihoods(self._now, prompts, answers))]
        before = now
        if self._before is not self._now:
            before = [*chain(*self._base.log_likelihoods(self._before, prompts, answers))]
        return fault(by_engine, now, before, self._base.dtype)


def fault(by_engine: list[float], now: list[float], before: list[float], dtype: str) -> str | None:
    """What speaks against an engine's having used an adapter; None: nothing does.

    Distances are Euclidean, over T tokens. The engine's log-likelihoods must be as near to those of the adapter as
    rounding explains, or half as far away as those of the adapter before it; and nearer to them than to those, unless
    the two adapters are so near to each other that rounding could decide this.

    Args:
        by_engine: Log-likelihoods of tokens by the engine, (T,) nats.
        now: The same by the worker's model with the adapter.
        before: The same with the adapter before it.
        dtype: Number type in which both compute.
    """
    if len(by_engine) != len(now):
        return f"it tells of {len(by_engine)} tokens of {len(now)} how likely they are"
    off, apart, from_before = math.dist(by_engine, now), math.dist(now, before), math.dist(by_engine, before)
    rounding, root = ROUNDING[dtype], math.sqrt(len(now))
    if not off <= max(GROSS * rounding * root, apart / 2):  # so put, it refuses what is not a number
        return f"log-likelihoods of tokens are {off / root:.2g} nats off, which rounding does not explain"
    if apart > APART * rounding and from_before < off:
        return "log-likelihoods of tokens are those of the adapter before it"
    return None


def _are_equal(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
