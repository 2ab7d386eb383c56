"""A client: its private data and its model, and what it does in a round: fine-tune, answer, evaluate.

It does not know in which process or on which machine it runs, nor what its model is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semcons_ray.config import GenerationConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import MessageError, NotFiniteError
from semcons_ray.evaluation.harness import Harness, TaskScore
from semcons_ray.federation.adapter_model import AdapterModel
from semcons_ray.federation.fleet import Evaluation
from semcons_ray.federation.opinions import choices
from semcons_ray.federation.randomness import Stage, stream
from semcons_ray.federation.token_probabilities import TokenProbabilities
from semcons_ray.federation.weights import non_finite, pack
from semcons_ray.messages import AdapterUpdate, Answers, Prompt, PseudoLabels, TokenScores
from semcons_ray.metering.ledger import Ledger, Work
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.client_model import SAMPLING, ClientModel, Pair, Purpose, Scores, State, Targets, Task

logger = logging.getLogger(__name__)

_PURPOSES: dict[Stage, Purpose] = {"fine_tune": "learn", "generate": "answer", "evaluate": "evaluate"}


@dataclass(frozen=True)
class Duties:
    """What all clients of a run have in common.

    Attributes:
        prompts: Public prompts, (P,); empty where the algorithm uses none.
        test: The held-out test set.
        num_answers: How many test prompts are answered at an evaluation.
        seed: The experiment's seed.
        scores_options: Whether the options of test prompts are scored at an evaluation.
        harness: Runs tasks of lm-eval in some of its rounds; None: there are none.
    """

    prompts: tuple[Prompt, ...]
    test: tuple[Example, ...]
    num_answers: int
    seed: int
    scores_options: bool = False
    harness: Harness | None = None

    @cached_property
    def tested(self) -> list[Pair]:
        """The test set as pairs to score."""
        return [Pair(example.prompt, example.response) for example in self.test]

    @cached_property
    def questions(self) -> list[tuple[Prompt, tuple[str, ...]]]:
        """Prompts of the test set with their options; none if these are not scored."""
        return [(example.prompt, example.options) for example in self.test if self.scores_options]


class Client:
    """One participant.

    Args:
        client_id: Its index, 0 to C-1.
        private: Its private examples. They never leave this object; only what the model learnt from them does.
        generation: Settings of its answers.
        duties: What it has in common with the other clients.
        model: Its model.
        ledger: Where its work is recorded.

    Attributes:
        learns: Has its model learn; by itself, or together with others' models.
    """

    def __init__(
        self,
        client_id: int,
        private: Sequence[Example],
        *,
        generation: GenerationConfig,
        duties: Duties,
        model: ClientModel,
        ledger: Ledger,
    ) -> None:
        self.client_id = client_id
        self.private = [Pair(example.prompt, example.response) for example in private]
        self.prompts = duties.prompts
        self.test = duties.tested
        self.questions = duties.questions
        self.harness = duties.harness
        self.num_answers = duties.num_answers
        self.generation = generation
        self.seed = duties.seed
        self.model = model
        self.ledger = ledger
        self.learns: Callable[[Sequence[Pair], Task], None] = model.learn
        self.train_loss: float | None = None
        self.num_pseudo_labels = 0

    def restore(self, state: State) -> None:
        """Take on the state that the model had after an earlier visit; an empty one makes a client that has not
        learnt."""
        self.model.restore(state)
        self.train_loss = None
        self.num_pseudo_labels = 0

    def fine_tune(
        self,
        round: int,
        labels: PseudoLabels,
        *,
        weight: float = 1.0,
        ema_decay: float = 0.0,
        downlink_bytes: int = 0,
        adjust: Callable[[Any], None] | None = None,
    ) -> None:
        """The local update: the model learns the private examples together with pseudo-labels.

        Args:
            round: The round, from 1.
            labels: Pseudo-labels of public prompts.
            weight: Weight of a pseudo-label in the loss, where a private example has 1; 0 leaves them out.
            ema_decay: See `Task`.
            downlink_bytes: Length of the message that brought the labels or weights, for the ledger.
            adjust: See `Task`.

        Raises:
            MessageError: A label's prompt id is not that of a public prompt.
        """
        labels.check_prompts(len(self.prompts))
        answered = zip(labels.prompt_ids, labels.responses, strict=True)
        public = [Pair(self.prompts[prompt_id], response, weight) for prompt_id, response in answered]
        self._learn(round, public if weight > 0 else [], ema_decay, downlink_bytes, adjust)

    def distil(
        self,
        round: int,
        targets: TokenProbabilities,
        *,
        weight: float = 1.0,
        ema_decay: float = 0.0,
        downlink_bytes: int = 0,
    ) -> None:
        """The local update: the model learns the private examples together with token probabilities.

        Args:
            round: The round, from 1.
            targets: Answers to all public prompts, or none, and what may come at each of their tokens. Of an answer
                longer than the client's own may be, the first `generation.max_new_tokens` tokens are learnt; those with
                a token that the model does not know, as only a faulty client sends, are left out.
            weight: Weight of a token of these in the loss, where one of a private example has 1; 0 leaves them out.
            ema_decay: See `Task`.
            downlink_bytes: Length of the message that brought the targets, for the ledger.

        Raises:
            MessageError: The targets are not of the public prompts.
        """
        if targets.answers and len(targets.answers) != len(self.prompts):
            raise MessageError(f"TokenTargets: {len(targets.answers)} answers to {len(self.prompts)} prompts")
        most, known, public = self.generation.max_new_tokens, self._adapted.num_tokens, list[Pair]()
        rows = zip(targets.answers, targets.tokens, targets.probabilities, strict=True)
        for prompt, (answer, tokens, chances) in zip(self.prompts, rows, strict=False):
            if max(*answer, int(tokens.max())) >= known:
                logger.warning("client %d, round %d: targets of a token over %d", self.client_id, round, known - 1)
                continue
            likely = torch.from_numpy(tokens[:most].astype(np.int64))
            shares = torch.from_numpy(chances[:most].astype(np.float32))
            learnt = Targets(answer[:most], likely, shares / shares.sum(dim=1, keepdim=True))
            public.append(Pair(prompt, "", weight, learnt))
        self._learn(round, public if weight > 0 else [], ema_decay, downlink_bytes)

    def _learn(
        self,
        round: int,
        public: Sequence[Pair],
        ema_decay: float,
        downlink_bytes: int,
        adjust: Callable[[Any], None] | None = None,
    ) -> None:
        pairs = [*self.private, *public]
        with self.ledger.stage("fine_tune", round=round, client_id=self.client_id) as work:
            work.downlink_bytes = downlink_bytes
            with self._task("fine_tune", round, work, ema_decay=ema_decay, adjust=adjust) as task:
                self.learns(pairs, task)
        self.train_loss = task.loss
        self.num_pseudo_labels = len(public)

    def answer(self, round: int, compression: str = "none") -> bytes:
        """Answer every public prompt, `generation.num_samples` times, and return the encoded `Answers` message."""
        counts = list[int]()
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            samples = self._samples(self.prompts, round, "generate", self.generation, work)
            if self.generation.send_draws == "choice":
                choice, counts = choices(samples)
                samples = [choice]
            first, *further = samples
            uplink = Answers(
                round_number=round,
                client_id=self.client_id,
                num_examples=len(self.private),
                answers=tuple(first),
                further=tuple(map(tuple, further)),
                counts=tuple(counts),
                confidence=self._confidence(samples, work) if self.generation.send_confidence else b"",
            ).encode(compression)
            work.uplink_bytes = len(uplink)
        return uplink

    def token_scores(self, round: int, top_k: int, compression: str = "none") -> bytes:
        """Answer every public prompt greedily, and return an encoded `TokenScores` message: the answers' tokens, and
        the `top_k` likeliest tokens at each of their places."""
        most = self.generation.max_new_tokens
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            (answers,) = self._samples(self.prompts, round, "generate", self._greedy, work)
            likely, processed = self._adapted.likeliest(self.prompts, answers, top_k, most)
            work.tokens += processed
            scores = TokenProbabilities(
                answers=tuple(tuple(one.answer) for one in likely),
                tokens=tuple(one.tokens.numpy() for one in likely),
                probabilities=tuple(one.probabilities.numpy() for one in likely),
            )
            tokens, probabilities = scores.packed()
            uplink = TokenScores(
                round_number=round,
                client_id=self.client_id,
                answers=scores.answers,
                tokens=tokens,
                probabilities=probabilities,
            ).encode(compression)
            work.uplink_bytes = len(uplink)
        return uplink

    @property
    def _greedy(self) -> GenerationConfig:
        return self.generation.model_copy(update={"temperature": 0.0, "num_samples": 1})

    def evaluate(self, round: int) -> Evaluation:
        """Answer the first `num_answers` prompts of the test set greedily. If the model can, score the reference
        answers, and the options and tasks of lm-eval that are wanted."""
        with self.ledger.stage("evaluate", round=round, client_id=self.client_id) as work:
            likelihood = self._likelihood(self.test, work)
            options: list[tuple[float, ...]] = []
            if self.questions and isinstance(self.model, AdapterModel):
                options, tokens = self.model.score_options(self.questions)
                work.tokens += tokens
            prompts = [pair.prompt for pair in self.test[: self.num_answers]]
            (answers,) = self._samples(prompts, round, "evaluate", self._greedy, work)
            tasks: tuple[TaskScore, ...] = ()
            if self.harness and round in self.harness.rounds and isinstance(self.model, AdapterModel):
                with self.model.held() as (model, name):
                    tasks = self.harness.scores(model, name)
        return Evaluation(*likelihood, tuple(answers), tuple(options), tasks)

    def score(self, round: int, examples: Sequence[Example]) -> Evaluation:
        """Score the reference answers of examples."""
        pairs = [Pair(example.prompt, example.response) for example in examples]
        with self.ledger.stage("evaluate", round=round, client_id=self.client_id) as work:
            return Evaluation(*self._likelihood(pairs, work), ())

    def check_finite(self, evaluation: Evaluation | None) -> None:
        """Check that training loss, tensors and test score are finite, as far as there are some.

        Raises:
            NotFiniteError: One is infinite or NaN; the message names it and the likely cause.
        """
        diverged = "training.learning_rate is probably too high"
        if self.train_loss is not None and not math.isfinite(self.train_loss):
            raise NotFiniteError(f"its training loss is {self.train_loss}; {diverged}")
        tensors = {key: value for key, value in self.model.state().items() if isinstance(value, Tensor)}
        if bad := non_finite(tensors):
            raise NotFiniteError(f"{bad} is not finite after training; {diverged}")
        if evaluation is not None and not math.isfinite(evaluation.nll_sum):
            raise NotFiniteError(f"its test NLL is {evaluation.nll_sum}; {diverged}, or model.dtype too narrow")

    def label_prompts(self, round: int) -> PseudoLabels:
        """The client's own answers to the public prompts, as pseudo-labels for itself; nothing is sent."""
        once = self.generation.model_copy(update={"num_samples": 1})
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            (answers,) = self._samples(self.prompts, round, "generate", once, work)
        return PseudoLabels.of(round - 1, [answer or None for answer in answers])

    def upload(self, round: int, tensors: Adapter, dtype: str, compression: str) -> bytes:
        """Encode tensors as an `AdapterUpdate`; see `weights.pack` for `dtype`.

        Raises:
            NotFiniteError: A value is not finite, or too large for `dtype`.
        """
        with self.ledger.stage("encode", round=round, client_id=self.client_id) as work:
            uplink = AdapterUpdate(
                round_number=round,
                client_id=self.client_id,
                num_examples=len(self.private),
                tensors=pack(tensors, dtype),
            ).encode(compression)
            work.uplink_bytes = len(uplink)
        return uplink

    # What algorithms that exchange weights work on -----------------------------------------------------------------

    @property
    def adapter(self) -> Adapter:
        """See `AdapterModel`."""
        return self._adapted.adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self._adapted.adapter = adapter

    @property
    def frozen(self) -> Adapter:
        """See `AdapterModel`."""
        return self._adapted.frozen

    @frozen.setter
    def frozen(self, frozen: Adapter) -> None:
        self._adapted.frozen = frozen

    @property
    def memory(self) -> dict[str, Tensor]:
        """See `AdapterModel`."""
        return self._adapted.memory

    def fresh_adapter(self, round: int | None = None) -> Adapter:
        """See `AdapterModel.fresh_adapter`."""
        return self._adapted.fresh_adapter(round)

    def export(self, folder: Path) -> None:
        """See `AdapterModel.export`."""
        self._adapted.export(folder)

    @property
    def _adapted(self) -> AdapterModel:
        if not isinstance(self.model, AdapterModel):
            raise TypeError(f"its model, a {type(self.model).__name__}, has no weights to exchange")
        return self.model

    # Work of the model -------------------------------------------------------------------------------------------

    def _likelihood(
        self, pairs: Sequence[Pair], work: Work
    ) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
        """NLL, tokens and bytes of the responses, as in `Score`; all empty if the model does not tell."""
        if not isinstance(self.model, Scores):
            return (), (), ()
        score = self.model.score(pairs)
        work.tokens += score.processed_tokens
        return score.nll, score.num_tokens, score.num_bytes

    def _confidence(self, samples: Sequence[Sequence[str]], work: Work) -> bytes:
        """See `Answers`: mean log-likelihood (nats a token) of each answer, of a conversation of all responses in it;
        empty if the model does not tell. Equal answers are scored once."""
        if not isinstance(self.model, Scores):
            return b""
        given = [(prompt, answer) for answers in samples for prompt, answer in zip(self.prompts, answers, strict=True)]
        pairs = [Pair(prompt, answer) for prompt, answer in dict.fromkeys(given) if answer]
        nll, lengths, _ = self._likelihood(pairs, work)
        means = {
            (pair.prompt, pair.response): -total / max(length, 1)
            for pair, total, length in zip(pairs, nll, lengths, strict=True)
        }
        return np.array([means.get(one, math.nan) for one in given], "<f4").tobytes()

    def _samples(
        self, prompts: Sequence[Prompt], round: int, stage: Stage, generation: GenerationConfig, work: Work
    ) -> list[list[str]]:
        """Answers to all prompts, `num_samples` times.

        Raises:
            ValueError: The model gave others than were asked for.
        """
        with self._task(stage, round, work, **{name: getattr(generation, name) for name in SAMPLING}) as task:
            samples = [[*answers] for answers in self.model.answer(prompts, task)]
        if [len(answers) for answers in samples] != [len(prompts)] * generation.num_samples:
            raise ValueError(
                f"its model gave {[*map(len, samples)]} answers, not {generation.num_samples} times {len(prompts)}"
            )
        if wrong := [answer for answers in samples for answer in answers if not isinstance(answer, str)]:
            raise ValueError(f"its model answered with {wrong[0]!r}, which is no text")
        return samples

    @contextmanager
    def _task(self, stage: Stage, round: int, work: Work, **settings: Any) -> Iterator[Task]:
        """A task for the model, whose costs are counted in `work`, also if it fails."""
        task = Task(round, _PURPOSES[stage], stream(self.seed, round, self.client_id, stage), **settings)
        try:
            yield task
        finally:
            work.tokens += task.tokens
            work.cost_usd += task.cost_usd
            work.waited_seconds += task.waited_seconds
            work.span = task.span
            work.note = work.note or task.note
