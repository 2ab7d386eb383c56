"""The interface of a client's model, whatever it is: an adapter on a base model in this process, or a black box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from semcons_ray.messages import Prompt

State = Mapping[str, Tensor | bytes]
"""What a client keeps from round to round, by name."""

Purpose = Literal["learn", "answer", "evaluate"]

SAMPLING = ("num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "stop")
"""What a `Task` says of how answers are sampled, under the names that it has in the settings, too."""


class Targets(NamedTuple):
    """What is to be learnt of an answer of T tokens instead of the answer: what may come at each place, K tokens.

    Attributes:
        answer: The tokens of the answer, (T,), which are read.
        tokens: The tokens that may come, (T, K) int64.
        probabilities: How likely each of them is to be, (T, K) float32; those of a place add up to 1.
    """

    answer: Sequence[int]
    tokens: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to learn or score, with its weight in the loss; of a conversation, all responses.

    Attributes:
        prompt: The question, or a conversation that ends in it.
        response: The answer.
        weight: Its weight in the loss; 1 for a private example.
        targets: For models that are adapted here: what is learnt in the place of `response`.
    """

    prompt: Prompt
    response: str
    weight: float = 1.0
    targets: Targets | None = None


class Score(NamedTuple):
    """How likely the responses of N pairs are.

    Attributes:
        nll: Negative log-likelihood (nats) of each pair's response tokens, including those that end answers, (N,).
        num_tokens: How many tokens those are, (N,).
        num_bytes: Length as UTF-8 of the text of these tokens, which does not depend on the tokenizer, (N,).
        processed_tokens: Tokens that went through the model, prompts included.
    """

    nll: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_bytes: tuple[int, ...]
    processed_tokens: int

    @property
    def nll_sum(self) -> float:
        """The sum of `nll`."""
        return sum(self.nll)


@dataclass
class Task:
    """What a model is asked to do, and what it tells of it.

    Attributes:
        round: The round, from 1; 0 where the base model is measured.
        purpose: "learn"; "answer" for public prompts, and "evaluate" for those of the test set.
        generator: Random numbers of the task, which are the same whenever it is done again.
        num_samples: Answers wanted to each prompt.
        temperature: Of sampling; 0 is greedy.
        top_p: The fewest tokens whose probabilities add up to this are sampled from.
        top_k: How many of the likeliest tokens are sampled from; 0: all.
        max_new_tokens: Longest answer, in tokens.
        stop: Texts that end an answer.
        ema_decay: Weight of what the model was before it learns, when that is averaged with what it becomes; for models
            that have weights to average.
        adjust: What an algorithm that exchanges weights does to their gradients before each step.
        tokens: Told by the model: tokens that it read and wrote.
        cost_usd: Told by the model: what was paid for it, in US dollars.
        note: Told by the model: what else is to be known of it, for the ledger.
        waited_seconds: Told by the model: time in which another process worked that has ledger rows of its own.
        span: Told by a model that shared the time with others: begin and end of its own part of it, unix seconds.
        loss: Told by a model that trains: mean loss in nats a token.
    """

    round: int
    purpose: Purpose
    generator: np.random.Generator
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 24
    stop: tuple[str, ...] = ()
    ema_decay: float = 0.0
    adjust: Callable[[Any], None] | None = None
    tokens: int = field(default=0, compare=False)
    cost_usd: float = field(default=0.0, compare=False)
    note: str = field(default="", compare=False)
    waited_seconds: float = field(default=0.0, compare=False)
    span: tuple[float, float] | None = field(default=None, compare=False)
    loss: float | None = field(default=None, compare=False)

    @property
    def seed(self) -> int:
        """A number of 32 bits that is this task's alone, for what takes no generator; to read it draws nothing."""
        return int(self.generator.bit_generator.seed_seq.generate_state(1)[0])


class ClientModel(Protocol):
    """What a client asks of its model.

    An object is made for each client where it works, and another on the driver, which only checks its settings; so to
    make one connects to nothing. It takes turns with itself only: `restore` comes before each visit, and what `state`
    returns after it is all that is kept. Before they have learnt, models of one name answer alike.

    An error that `learn` or `answer` raises loses the client for the round, and a `UserError` ends the run.

    A model may also have `environment`, names of the environment variables that it needs, which are checked on the
    driver and given to its worker; and the methods of `Scores`, without which metrics that need likelihood are absent.
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


@runtime_checkable
class Scores(Protocol):
    """What a model may also tell: how likely it finds a text."""

    def score(self, pairs: Sequence[Pair]) -> Score:
        """Score how likely the responses are."""
        ...
