"""A client whose model is behind an OpenAI-compatible API and cannot be trained here: it learns in context, or by the
provider's fine-tuning jobs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from pydantic import Field

from semcons_ray.config import EndpointConfig
from semcons_ray.endpoints.endpoint import Endpoint, Request, cap_of, estimate_tokens
from semcons_ray.endpoints.kept_calls import Call, Job
from semcons_ray.errors import UnansweredError
from semcons_ray.messages import Prompt, Turn, text_of, turns_of
from semcons_ray.modeling.client_model import Pair, State, Task

if TYPE_CHECKING:
    from semcons_ray.modeling.embedding import Embedder

_PAIRS, _TUNED = "pairs", "tuned_model"

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 1.0, 60.0
"""How often a fine-tuning job is asked after: at first, and when it takes long."""


class ApiOptions(EndpointConfig):
    """Options of clients of the kind openai."""

    learning: Literal["in_context", "fine_tuning"] = Field(
        "in_context",
        description="in_context: the examples nearest to a question go before it. fine_tuning: in each round the "
        "provider trains the model that the client had before on its private examples and pseudo-labels, all with the "
        "same weight.",
    )
    k: int = Field(
        4,
        ge=0,
        description="Examples that go before a question, of the private ones and the pseudo-labels those whose "
        "questions are nearest to it by the server's embedding model. 0: none, so that it learns nothing.",
    )
    context_tokens: int = Field(
        2000,
        ge=1,
        description="Most tokens of a conversation with its examples, estimated at 4 bytes of UTF-8 each; the farthest "
        "examples are left out until it fits.",
    )
    job_timeout_seconds: float = Field(
        86400.0, gt=0, description="Longest wait for a fine-tuning job; then the client is lost for the round."
    )
    usd_per_million_training_tokens: float = Field(
        0.0, ge=0, description="Price of a million tokens trained on in fine-tuning jobs, in US dollars."
    )


class ApiModel:
    """A model behind an OpenAI-compatible API; a `ClientModel`.

    Args:
        options: Its options.
        name: Its name in `clients.models`.
        client_id: The client.
        embedding_model: Name of the model by which similar questions are found; it is loaded when it is needed.
        folder: The client's folder, for answered calls and jobs.
        system_prompt: Text before every conversation that has no system turn; empty: none.

    Raises:
        ConfigError: The model, the address or the key is missing.
    """

    def __init__(
        self, options: ApiOptions, *, name: str, client_id: int, embedding_model: str, folder: Path, system_prompt: str
    ) -> None:
        self.options = options
        self.client_id = client_id
        self.embedding_model = embedding_model
        self.system_prompt = system_prompt
        self.endpoint = Endpoint(options, folder, f"clients.models.{name}.options")
        self.restore({})

    @property
    def environment(self) -> tuple[str, ...]:
        """The environment variable that holds the key."""
        return (self.options.api_key_env,) if self.options.api_key_env else ()

    def restore(self, state: State) -> None:
        """See `ClientModel.restore`."""
        kept = {name: value for name, value in state.items() if isinstance(value, bytes)}
        self._pairs = msgspec.json.decode(kept.get(_PAIRS, b"[]"), type=list[Pair])
        self._tuned = kept.get(_TUNED, b"").decode()
        vars(self).pop("_vectors", None)

    def state(self) -> dict[str, bytes]:
        """The examples that it has learnt in context, or the name of the model that came of fine-tuning."""
        if self.options.learning == "fine_tuning":
            return {_TUNED: self._tuned.encode()}
        return {_PAIRS: msgspec.json.encode(self._pairs)}

    def learn(self, pairs: Sequence[Pair], task: Task) -> None:
        """Keep the examples, to show them with questions; or have the provider train on them.

        Raises:
            UnansweredError: The job failed, or took too long.
        """
        if self.options.learning == "fine_tuning":
            self._fine_tune(pairs, task)
        else:
            self.restore({_PAIRS: msgspec.json.encode([*pairs])})

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[list[str]]:
        """See `ClientModel.answer`. Tokens and price are those of all answers, whenever they were given.

        Raises:
            UnansweredError: No prompt got an answer; see `Endpoint.ask`.
        """
        what = self._what(task)
        seeds = task.generator.integers(1 << 31, size=(len(prompts), task.num_samples)).tolist()
        shown = self._conversations(prompts)
        requests = [
            Request(
                task=f"{what}, prompt {number}, sample {sample}",
                turns=turns,
                max_tokens=task.max_new_tokens,
                temperature=task.temperature,
                top_p=task.top_p,
                top_k=task.top_k,
                seed=seeds[number][sample],
                stop=task.stop,
                model=self._tuned,
            )
            for sample in range(task.num_samples)
            for number, turns in enumerate(shown)
        ]
        replies = self.endpoint.ask(requests, what)
        calls = [reply for reply in replies if isinstance(reply, Call)]
        task.tokens += sum(call.tokens for call in calls)
        task.cost_usd += sum(call.usd for call in calls)
        task.note = cap_of(replies)
        answers = [reply.answer if isinstance(reply, Call) else "" for reply in replies]
        return [answers[sample * len(prompts) :][: len(prompts)] for sample in range(task.num_samples)]

    def close(self) -> None:
        """Close connections."""
        self.endpoint.close()

    def _what(self, task: Task) -> str:
        return f"client {self.client_id}, round {task.round}, {task.purpose}"

    def _conversations(self, prompts: Sequence[Prompt]) -> list[tuple[Turn, ...]]:
        """What is sent for each prompt: the system prompt, examples, the nearest last, and the prompt."""
        nearest = self._nearest(prompts)
        return [self._within(turns_of(prompt), places) for prompt, places in zip(prompts, nearest, strict=True)]

    def _nearest(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Places of the `k` examples that are nearest to each prompt, the nearest first."""
        count = min(self.options.k, len(self._pairs))
        if not count or not prompts:
            return [[] for _ in prompts]
        asked = _embedder(self.embedding_model).embed([text_of(prompt) for prompt in prompts])
        order = (asked @ self._vectors.T).argsort(dim=1, descending=True, stable=True)
        return [[int(place) for place in row] for row in order[:, :count]]

    @cached_property
    def _vectors(self) -> Any:
        """Vectors of the examples' prompts, (N, D)."""
        return _embedder(self.embedding_model).embed([text_of(pair.prompt) for pair in self._pairs])

    def _within(self, asked: tuple[Turn, ...], nearest: Sequence[int]) -> tuple[Turn, ...]:
        """A conversation with as many examples, from the nearest on, as `context_tokens` have room for."""
        if asked[0].role == "system":
            system, asked = asked[:1], asked[1:]
        else:
            system = (Turn("system", self.system_prompt),) if self.system_prompt else ()
        room = self.options.context_tokens - _tokens((*system, *asked))
        examples: tuple[Turn, ...] = ()
        for place in nearest:
            turns = _example(self._pairs[place])
            room -= _tokens(turns)
            if room < 0:
                break
            examples = turns + examples
        return (*system, *examples, *asked)

    def _fine_tune(self, pairs: Sequence[Pair], task: Task) -> None:
        lines = [{"messages": [turn._asdict() for turn in self._lesson(pair)]} for pair in pairs]
        content = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        base = self._tuned or self.options.model
        key = hashlib.sha256(f"{self._what(task)}\n{base}\n".encode() + content).hexdigest()
        kept = self.endpoint.kept
        try:
            job = kept.get(Job, key) or self._start(key, base, content, task.seed)
            if not job.model:
                job = self._finished(job)
                kept.add(job)
        except UnansweredError as error:
            raise UnansweredError(f"{self._what(task)}: {error}") from None
        except Exception as error:
            self.endpoint.fail(error, self._what(task))
        self._tuned = job.model
        task.tokens += job.tokens
        task.cost_usd += job.usd

    def _start(self, key: str, base: str, content: bytes, seed: int) -> Job:
        """Start a job. If this process is killed before it is written down, a resumed run starts another."""
        client = self.endpoint.client
        file = client.files.create(file=("examples.jsonl", content), purpose="fine-tune")
        once = client.with_options(max_retries=0)  # a request that was lost on its way back would start a second job
        job = once.fine_tuning.jobs.create(model=base, training_file=file.id, seed=seed % (1 << 31))
        started = Job(key=key, id=job.id)
        self.endpoint.kept.add(started)
        return started

    def _finished(self, job: Job) -> Job:
        """Wait until a job is done.

        Raises:
            UnansweredError: It failed, or takes too long.
        """
        until, pause = time.monotonic() + self.options.job_timeout_seconds, FIRST_POLL_SECONDS
        while True:
            found = self.endpoint.client.fine_tuning.jobs.retrieve(job.id)
            if found.status == "succeeded" and found.fine_tuned_model:
                tokens = found.trained_tokens or 0
                usd = tokens * self.options.usd_per_million_training_tokens / 1e6
                return msgspec.structs.replace(job, model=found.fine_tuned_model, tokens=tokens, usd=usd)
            if found.status in ("failed", "cancelled", "succeeded"):
                said = self.endpoint.clean(getattr(found.error, "message", None) or "nothing is said of why")
                setting = f"{self.endpoint.setting}.learning"
                raise UnansweredError(f"the fine-tuning job {job.id} has {found.status}: {said}; see {setting}")
            if time.monotonic() + pause > until:
                setting = f"{self.endpoint.setting}.job_timeout_seconds"
                raise UnansweredError(f"the fine-tuning job {job.id} is still {found.status}; see {setting}")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    def _lesson(self, pair: Pair) -> tuple[Turn, ...]:
        """An example as it is trained on."""
        turns = turns_of(pair.prompt)
        if self.system_prompt and turns[0].role != "system":
            turns = (Turn("system", self.system_prompt), *turns)
        return (*turns, Turn("assistant", pair.response))


def _example(pair: Pair) -> tuple[Turn, ...]:
    """An example in front of a question; a system turn of its own becomes a part of its first question."""
    turns = turns_of(pair.prompt)
    if turns[0].role == "system":
        system, first, *rest = turns
        turns = (Turn(first.role, f"{system.content}\n\n{first.content}"), *rest)
    return (*turns, Turn("assistant", pair.response))


def _tokens(turns: Sequence[Turn]) -> int:
    return sum(estimate_tokens(turn.content) for turn in turns)


@cache
def _embedder(name: str) -> Embedder:
    """The embedding model, once in a process."""
    from semcons_ray.modeling.embedding import Embedder
    from semcons_ray.modeling.packaged import resolve_model

    return Embedder(resolve_model(name))
