"""The interface of a client's model, whatever it is: an adapter on a base model in this process, or a black box."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from semcons_ray.messages import Prompt

State = Mapping[str, Tensor | bytes]
"""What a client keeps from round to round, by name."""


@dataclass(frozen=True)
class Pair:
    """An example to learn from.

    Attributes:
        prompt: The question, or a conversation that ends in it.
        response: The answer.
        weight: Its weight in the loss; 1 for a private example.
    """

    prompt: Prompt
    response: str
    weight: float = 1.0


@dataclass
class Task:
    """What a model is asked to do, and what it tells of it.

    Attributes:
        round: The round, from 1; 0 where the base model is measured.
        purpose: "learn"; "answer" for public prompts, and "evaluate" for those of the test set.
        seed: Seed of the task's random numbers, of this client, round and purpose.
        num_samples: Answers wanted to each prompt.
        temperature: Of sampling; 0 is greedy.
        max_new_tokens: Longest answer, in tokens.
        stop: Texts that end an answer.
        tokens: Told by the model: tokens that it read and wrote.
        cost_usd: Told by the model: what was paid for it, in US dollars.
        loss: Told by a model that trains: mean loss in nats a token.
    """

    round: int
    purpose: str
    seed: int
    num_samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 24
    stop: tuple[str, ...] = ()
    tokens: int = field(default=0, compare=False)
    cost_usd: float = field(default=0.0, compare=False)
    loss: float = field(default=math.nan, compare=False)


class ClientModel(Protocol):
    """What a client asks of its model.

    An object is made for each client, and takes turns with itself only: `restore` comes before each visit, and what
    `state` returns after it is all that is kept. A model may have two more methods: `score(pairs)`, which gives the
    negative log-likelihood of responses, and without which metrics that need it are absent; and `close()`.
    """

    def learn(self, pairs: Sequence[Pair], task: Task) -> None:
        """Learn from the private examples, and from pseudo-labels, which come after them."""
        ...

    def answer(self, prompts: Sequence[Prompt], task: Task) -> Sequence[Sequence[str]]:
        """Answers: `task.num_samples` times one to each prompt; an empty text where there is none."""
        ...

    def state(self) -> State:
        """Everything that the next visit needs."""
        ...

    def restore(self, state: State) -> None:
        """Take on what `state` returned after an earlier visit; an empty one makes a client that has not learnt."""
        ...
