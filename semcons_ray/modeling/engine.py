"""The interface of generation engines: token ids and an adapter go in, token ids come out.

An engine holds one base model and answers for all clients that have it at once, each with the adapter that comes with
its request; see vllm_engine.py. Tokenisation stays with the client's `LanguageModel`, so that answers by an engine and
by the model itself begin with the same ids and end at the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class EngineRequest:
    """Prompts of one client.

    Attributes:
        prompts: Token ids of each prompt; where several answers are wanted, all of them are there again for each.
        adapter: Contents of the adapter's files in PEFT's format, by file name.
        max_new_tokens: Longest answer, in tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_p: The fewest tokens whose probabilities add up to this are sampled from.
        top_k: How many of the likeliest tokens are sampled from; 0: all.
        ends: Ids that end an answer.
        stop: Texts that end an answer.
        seeds: Seed of each prompt's own random stream.
        num_told: Of how many answers, from the first, the reply tells how likely their tokens are.
    """

    prompts: Sequence[Sequence[int]]
    adapter: Mapping[str, bytes]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    ends: Sequence[int]
    stop: Sequence[str]
    seeds: Sequence[int]
    num_told: int = 0


@dataclass(frozen=True)
class Told:
    """An answer, and how likely the engine finds it.

    Attributes:
        ids: Its token ids, with that of the token that ended it.
        log_likelihoods: Log-likelihood of each in nats, at temperature 1.
    """

    ids: list[int]
    log_likelihoods: list[float]


@dataclass(frozen=True)
class EngineReply:
    """Answers, and what they cost.

    Attributes:
        answers: Token ids of each answer, in the order of the prompts, without the token that ended it; those of a text
            that did are there.
        num_tokens: Tokens generated, including those that ended answers.
        engine: Name of the engine, for the ledger.
        node: Host name of the machine it runs on.
        gpus: UUIDs of the GPUs on which it computes, separated by commas; empty: it computes on the CPU.
        started_at: Start of the request's part of the engine's busy time, unix seconds.
        busy_seconds: Length of that part. Requests are worked on at the same time, but each is given a stretch of its
            own, so that all parts add up to the time that the engine was busy.
        told: The first answers, as many as the request asks for.
    """

    answers: list[list[int]]
    num_tokens: int
    engine: str
    node: str
    gpus: str
    started_at: float
    busy_seconds: float
    told: list[Told] = field(default_factory=list)


class Engine(Protocol):
    """Answers requests of many clients. It may be called from several threads."""

    def generate(self, request: EngineRequest) -> EngineReply:
        """Answer all prompts of a request.

        Raises:
            EngineError: The engine broke, or the adapter does not fit it.
        """
        ...
