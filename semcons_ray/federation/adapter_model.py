"""The model of a client that can be trained here: an adapter of its own on a base model that clients share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from semcons_ray.config import GenerationConfig, ModelConfig, PerClient, ShardingConfig, TrainingConfig
from semcons_ray.federation.randomness import stream
from semcons_ray.federation.weights import stacked, with_rank
from semcons_ray.messages import Prompt
from semcons_ray.metering.gpus import this_place
from semcons_ray.metering.ledger import Ledger, LedgerRow, Place
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.client_model import SAMPLING, Pair, Score, State, Targets, Task
from semcons_ray.modeling.engine import Engine
from semcons_ray.modeling.handover import HandOver

if TYPE_CHECKING:  # the driver sends what a worker is built from without loading transformers
    from semcons_ray.modeling.language_model import FineTuned, LanguageModel, Lesson

_ADAPTER, _OPTIMIZER, _FROZEN, _MEMORY = "adapter.", "optimizer.", "frozen.", "memory."


class AdapterModel:
    """An adapter on a base model; a `ClientModel` whose weights algorithms may exchange.

    Args:
        client_id: The client.
        base: Base model with a place for an adapter, shared by the clients of a worker.
        rank: LoRA rank of the adapter, at most the base model's.
        training: Settings of its local update.
        batch_size: Prompts answered, and texts scored, at once.
        seed: The experiment's seed.
        ledger: Where the engine's work is recorded.
        handover: Hands its adapter to the engine that generates its answers; None: the base model does.

    Attributes:
        frozen: An adapter of any rank that is added to the base model and not trained; empty: there is none.
        optimizer: State of the optimizer; empty unless it is kept.
        memory: What an algorithm has the client remember.
    """

    def __init__(
        self,
        client_id: int,
        base: LanguageModel,
        *,
        rank: int,
        training: TrainingConfig,
        batch_size: int,
        seed: int,
        ledger: Ledger,
        handover: HandOver | None = None,
    ) -> None:
        self.client_id = client_id
        self.base = base
        self.rank = rank
        self.training = training
        self.batch_size = batch_size
        self.seed = seed
        self.ledger = ledger
        self.handover = handover
        self.restore({})

    def restore(self, state: State) -> None:
        """See `ClientModel.restore`."""
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self._adapter, self.optimizer, self.frozen, self.memory = (
            {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            for part in (_ADAPTER, _OPTIMIZER, _FROZEN, _MEMORY)
        )
        self._has_learnt = bool(self._adapter)

    @property
    def adapter(self) -> Adapter:
        """The client's adapter; a fresh one, made when it is asked for, where it has none."""
        if not self._adapter:
            self._adapter = self.fresh_adapter()
        return self._adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def state(self) -> dict[str, Tensor]:
        """Adapter, optimizer state, frozen adapter, and the algorithm's memory.

        Random streams need no state; see `randomness`.
        """
        parts = {_ADAPTER: self.adapter, _OPTIMIZER: self.optimizer, _FROZEN: self.frozen, _MEMORY: self.memory}
        return {part + key: value for part, tensors in parts.items() for key, value in tensors.items()}

    def fresh_adapter(self, round: int | None = None) -> Adapter:
        """An adapter of this client's rank whose update B A is zero.

        Without a round, A is the one from which all clients start; with a round, it is drawn for this client and round.
        """
        drawn = None if round is None else stream(self.seed, round, self.client_id, "adapter")
        return with_rank(self.base.fresh_adapter(drawn), self.rank)

    def learn(self, pairs: Sequence[Pair], task: Task) -> None:
        """Train the adapter on all pairs together.

        With `task.ema_decay`, it becomes its average with the adapter from before; but not at the client's first
        update, which has no earlier adapter to keep.
        """
        lesson = self._lesson(pairs, task)
        [learnt] = self.base.fine_tune_together([lesson])
        self._take(lesson, learnt, task)

    def _lesson(self, pairs: Sequence[Pair], task: Task) -> Lesson:
        from semcons_ray.modeling.language_model import Lesson

        return Lesson(
            dict(self.adapter), pairs, self.training, task.generator, self.optimizer, self.frozen, task.adjust
        )

    def _take(self, lesson: Lesson, learnt: FineTuned, task: Task) -> None:
        """Become what a lesson has made of the adapter."""
        before, self.adapter = self.adapter, lesson.adapter
        if self._has_learnt and task.ema_decay > 0:
            # Averages along a client's path lose the noise of its steps, as averages over clients do.
            kept = {key: task.ema_decay * value for key, value in before.items()}
            self.adapter = {key: kept[key] + (1 - task.ema_decay) * value for key, value in self.adapter.items()}
        self.optimizer = learnt.optimizer
        task.tokens, task.loss = learnt.tokens, learnt.loss

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[list[str]]:
        """See `ClientModel.answer`; the first answers are those of a client that draws no more."""
        generation = GenerationConfig(batch_size=self.batch_size, **{name: getattr(task, name) for name in SAMPLING})
        if self.handover is not None:
            return self._engine_answers(self.handover, prompts, task, generation)
        answers, tokens = self.base.generate(self.adapter, prompts, generation, task.generator, frozen=self.frozen)
        task.tokens += tokens
        return _by_sample(answers, task)

    def _engine_answers(
        self, handover: HandOver, prompts: Sequence[Prompt], task: Task, generation: GenerationConfig
    ) -> list[list[str]]:
        request = self.base.engine_request(self.adapter, prompts, generation, task.generator)
        replies = handover.ask(self.adapter, request)
        task.waited_seconds = sum(seconds for _, seconds in replies)
        for reply, _ in replies:
            self.ledger.add(
                LedgerRow(
                    round=task.round,
                    client_id=self.client_id,
                    worker=reply.engine,
                    node=reply.node,
                    stage="generate" if task.purpose == "answer" else "evaluate",
                    started_at=reply.started_at,
                    duration_seconds=reply.busy_seconds,
                    tokens=reply.num_tokens,
                    gpus=reply.gpus,
                )
            )
        return _by_sample(self.base.decode(reply.answers, generation.stop), task)

    def score(self, pairs: Sequence[Pair]) -> Score:
        """See `Scores.score`."""
        return self.base.negative_log_likelihood(self.adapter, pairs, self.batch_size, frozen=self.frozen)

    def likeliest(
        self, prompts: Sequence[Prompt], answers: Sequence[str], top_k: int, max_tokens: int
    ) -> tuple[list[Targets], int]:
        """See `LanguageModel.likeliest`: of the first `max_tokens` tokens of answers, given as texts."""
        ids = [
            self.base.response_ids(prompt, answer)[:max_tokens] for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return self.base.likeliest(self.adapter, prompts, ids, top_k, self.batch_size, frozen=self.frozen)

    @property
    def num_tokens(self) -> int:
        """How many tokens the model knows."""
        return int(self.base.model.get_output_embeddings().weight.shape[0])

    def score_options(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> tuple[list[tuple[float, ...]], int]:
        """See `LanguageModel.option_nll`."""
        return self.base.option_nll(self.adapter, questions, self.batch_size, frozen=self.frozen)

    @contextmanager
    def held(self) -> Iterator[tuple[Any, str]]:
        """The transformers model with the client's adapter in it, and its folder."""
        with self.base.holding(self.adapter, self.frozen) as model:
            yield model, self.base.name

    def export(self, folder: Path) -> None:
        """Write the adapter, joined with the frozen one if there is one, to an existing folder in PEFT's format."""
        both = stacked([self.frozen, self.adapter], [1.0, 1.0]) if self.frozen else self.adapter
        self.base.export_adapter(both, folder)


class Learning(NamedTuple):
    """What a model is to learn; see `AdapterModel.learn`."""

    model: AdapterModel
    pairs: Sequence[Pair]
    task: Task


def learn_together(all_of_them: Sequence[Learning]) -> None:
    """`AdapterModel.learn` for models of several clients on one base model, in one batch where their settings allow it.

    Each task is told the span of time that is its own: the time of a batch is divided by tokens.
    """
    alike: dict[tuple[bool, ...], list[Learning]] = {}
    for learning in all_of_them:
        training = learning.model.training
        how = (training.packing, training.gradient_checkpointing, training.auto_find_batch_size)
        alike.setdefault(how, []).append(learning)
    for group in alike.values():
        started_at, start = time.time(), time.perf_counter()
        lessons = [model._lesson(pairs, task) for model, pairs, task in group]
        results = group[0].model.base.fine_tune_together(lessons)
        seconds, tokens = time.perf_counter() - start, sum(learnt.tokens for learnt in results)
        for (model, _, task), lesson, learnt in zip(group, lessons, results, strict=True):
            model._take(lesson, learnt, task)
            own = seconds * (learnt.tokens / tokens if tokens else 1 / len(group))
            task.span = (started_at, started_at + own)
            started_at += own


def _by_sample(answers: Sequence[str], task: Task) -> list[list[str]]:
    """The answers to all prompts for each sample, from those of all samples one after another."""
    size = len(answers) // task.num_samples
    return [[*answers[sample * size :][:size]] for sample in range(task.num_samples)]


@dataclass(frozen=True)
class AdapterModels:
    """Everything from which a worker makes models of clients that have one base model.

    Attributes:
        model: Model settings, with `dtype` resolved and `name` the model of these clients.
        device: "cpu" or "cuda".
        threads: CPU threads.
        ranks: LoRA ranks that clients have in turn, by id.
        training: Settings of local updates by client id.
        generation: Settings of answers by client id.
        clients: Ids of the clients that have the model.
        sharding: How the model is divided among ranks, of which this process is one; None: the model is whole here.
        engine: The engine that generates the clients' answers; None: the worker's own model does.
    """

    model: ModelConfig
    device: str
    threads: int
    ranks: tuple[int, ...]
    training: PerClient[TrainingConfig]
    generation: PerClient[GenerationConfig]
    clients: range
    sharding: ShardingConfig | None = None
    engine: Engine | None = None

    environment: tuple[str, ...] = ()
    keeps_files: ClassVar[bool] = False

    def make(self, seed: int, ledger: Ledger) -> Adapted:
        """Load the base model; the GPUs on which it is are noted in the ledger.

        Raises:
            ModelError: The model cannot be found or loaded.
        """
        from semcons_ray.modeling.language_model import LanguageModel
        from semcons_ray.modeling.packaged import resolve_model

        torch.set_num_threads(self.threads)
        kind: type[LanguageModel] = LanguageModel
        more = dict[str, Any]()
        if self.sharding is not None:
            from semcons_ray.modeling.sharded import ShardedLanguageModel

            kind, more = ShardedLanguageModel, {"sharding": self.sharding}
        folder, trainings = resolve_model(self.model.name), self.training.distinct(self.clients)
        base = kind.of(self.model, folder, device=self.device, seed=seed, trainings=trainings, **more)
        place = this_place(uses_gpu=self.device == "cuda")
        ledger.gpus = Place.of_all(base.of_all_ranks(place)).gpus
        return Adapted(self, base, seed, ledger, None if self.engine is None else HandOver(self.engine, base))


@dataclass(frozen=True)
class Adapted:
    """Models of clients that have one base model; see `host.Models`.

    Attributes:
        spec: What they are made from.
        base: The base model.
        seed: The experiment's seed.
        ledger: See `AdapterModel`.
        handover: See `AdapterModel`.
    """

    spec: AdapterModels
    base: LanguageModel
    seed: int
    ledger: Ledger
    handover: HandOver | None = None

    @property
    def first_adapter(self) -> Adapter:
        """The adapter from which all clients start, at the base model's own rank."""
        return self.base.fresh_adapter()

    @property
    def writes(self) -> bool:
        """See `host.Models`."""
        return self.base.writes

    def __getitem__(self, client_id: int, /) -> AdapterModel:
        """A model of the client that has not learnt yet."""
        spec = self.spec
        return AdapterModel(
            client_id,
            self.base,
            rank=spec.ranks[client_id % len(spec.ranks)],
            training=spec.training[client_id],
            batch_size=spec.generation[client_id].batch_size,
            seed=self.seed,
            ledger=self.ledger,
            handover=self.handover,
        )
