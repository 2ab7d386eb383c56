"""What a client sees of a generation engine: token ids and an adapter go in, token ids come out.

An engine holds one base model and answers all its clients at once, each with the adapter that comes with the request;
see vllm_engine.py. Tokenisation stays with the client's `LanguageModel`, so that both ways of generating see the same
ids and end at the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EngineRequest:
    """Prompts of one client.

    Attributes:
        prompts: Token ids of each.
        adapter: Files of the adapter in PEFT's format, by name.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        ends: Ids that end an answer.
        seeds: Of each prompt's own random stream.
    """

    prompts: Sequence[Sequence[int]]
    adapter: Mapping[str, bytes]
    max_new_tokens: int
    temperature: float
    ends: Sequence[int]
    seeds: Sequence[int]


@dataclass(frozen=True)
class EngineReply:
    """Answers, and what they cost.

    Attributes:
        answers: Token ids of each answer, in the order of the prompts, without its end.
        num_tokens: Tokens generated, ends counted.
        engine: Name of the engine, for the ledger.
        node: Machine it runs on.
        gpus: UUIDs of the GPUs that it computes on, with commas between; empty: it computes on the CPU.
        started_at: Start of the request's part of the engine's busy time, unix seconds.
        busy_seconds: Length of that part. Requests are worked on side by side; their parts follow each other, so that
            all parts together are the time that the engine was busy.
    """

    answers: list[list[int]]
    num_tokens: int
    engine: str
    node: str
    gpus: str
    started_at: float
    busy_seconds: float


class Engine(Protocol):
    """Answers requests of many clients; safe to call from several threads."""

    def generate(self, request: EngineRequest) -> EngineReply:
        """Answer all prompts of a request.

        Raises:
            EngineError: The engine broke, or the adapter does not fit it.
        """
        ...
