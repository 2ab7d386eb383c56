"""A client: its private data and adapter, and what it does in a round: fine-tune, answer, evaluate.

It does not know in which process or on which machine it runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from semcons_ray.config import GenerationConfig, TrainingConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import NotFiniteError
from semcons_ray.evaluation.harness import Harness, TaskScore
from semcons_ray.federation.fleet import Evaluation
from semcons_ray.federation.randomness import Stage, stream
from semcons_ray.federation.weights import non_finite, pack, stacked, with_rank
from semcons_ray.messages import AdapterUpdate, Answers, Prompt, PseudoLabels
from semcons_ray.metering.ledger import Ledger, LedgerRow, Work
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.client_model import Pair, Score
from semcons_ray.modeling.engine import Engine
from semcons_ray.modeling.language_model import Adjust, LanguageModel

_ADAPTER, _OPTIMIZER, _FROZEN, _MEMORY = "adapter.", "optimizer.", "frozen.", "memory."


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


class Client:
    """One participant.

    Args:
        client_id: Its index, 0 to C-1.
        private: Its private examples. They never leave this object; only what the model learnt from them does.
        rank: LoRA rank of its adapter, at most the model's.
        training: Settings of its local update.
        generation: Settings of its answers.
        duties: What it has in common with the other clients.
        model: Base model with a place for an adapter, shared by the clients of a worker.
        ledger: Where its work is recorded.
        engine: The engine that generates its answers; None: its own model does.
    """

    def __init__(
        self,
        client_id: int,
        private: Sequence[Example],
        *,
        rank: int,
        training: TrainingConfig,
        generation: GenerationConfig,
        duties: Duties,
        model: LanguageModel,
        ledger: Ledger,
        engine: Engine | None = None,
    ) -> None:
        self.client_id = client_id
        self.private = [Pair(example.prompt, example.response) for example in private]
        self.rank = rank
        self.prompts = duties.prompts
        self.test = [Pair(example.prompt, example.response) for example in duties.test]
        self.questions = [(example.prompt, example.options) for example in duties.test if duties.scores_options]
        self.harness = duties.harness
        self.num_answers = duties.num_answers
        self.training = training
        self.generation = generation
        self.seed = duties.seed
        self.model = model
        self.ledger = ledger
        self.engine = engine
        self.restore({})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take on the state that `state` returned earlier; an empty dict makes a client that has not trained yet."""
        self.adapter, self.optimizer, self.frozen, self.memory = (
            {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            for part in (_ADAPTER, _OPTIMIZER, _FROZEN, _MEMORY)
        )
        self.has_trained = bool(self.adapter)
        if not self.adapter:
            self.adapter = self.fresh_adapter()
        self.train_loss = math.nan
        self.num_learnt = 0
        self.num_pseudo_labels = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next visit needs: adapter, optimizer state, frozen adapter, and the algorithm's memory.

        Random streams need no state; see `randomness`.
        """
        parts = {_ADAPTER: self.adapter, _OPTIMIZER: self.optimizer, _FROZEN: self.frozen, _MEMORY: self.memory}
        return {part + key: value for part, tensors in parts.items() for key, value in tensors.items()}

    def fresh_adapter(self, round: int | None = None) -> Adapter:
        """An adapter of this client's rank whose update B A is zero.

        Without a round, A is the one from which all clients start; with a round, it is drawn for this client and round.
        """
        drawn = None if round is None else stream(self.seed, round, self.client_id, "adapter")
        return with_rank(self.model.fresh_adapter(drawn), self.rank)

    def fine_tune(
        self,
        round: int,
        labels: PseudoLabels,
        *,
        weight: float = 1.0,
        ema_decay: float = 0.0,
        downlink_bytes: int = 0,
        adjust: Adjust | None = None,
    ) -> None:
        """The local update: train the adapter on the private examples together with pseudo-labels.

        Args:
            round: The round, from 1.
            labels: Pseudo-labels of public prompts.
            weight: Weight of a pseudo-label in the loss, where a private example has 1; 0 leaves them out.
            ema_decay: Weight of the adapter from before this call when it is averaged with the trained one. It is not
                used in the client's first update, which has no earlier adapter to keep.
            downlink_bytes: Length of the message that brought the labels or weights, for the ledger.
            adjust: What an algorithm does to gradients before each step.

        Raises:
            MessageError: A label's prompt id is not that of a public prompt.
        """
        labels.check_prompts(len(self.prompts))
        pairs = list(self.private)
        if weight > 0:
            answered = zip(labels.prompt_ids, labels.responses, strict=True)
            pairs += [Pair(self.prompts[prompt_id], response, weight) for prompt_id, response in answered]
        before = dict(self.adapter)
        with self.ledger.stage("fine_tune", round=round, client_id=self.client_id) as work:
            result = self.model.fine_tune(
                self.adapter,
                pairs,
                self.training,
                stream(self.seed, round, self.client_id, "fine_tune"),
                self.optimizer,
                frozen=self.frozen,
                adjust=adjust,
            )
            work.tokens = result.tokens
            work.downlink_bytes = downlink_bytes
        if self.has_trained and ema_decay > 0:
            # Averages along a client's path lose the noise of its steps, as averages over clients do.
            kept = {key: ema_decay * value for key, value in before.items()}
            self.adapter = {key: kept[key] + (1 - ema_decay) * value for key, value in self.adapter.items()}
        self.optimizer = result.optimizer
        self.train_loss = result.loss
        self.num_learnt = len(pairs)
        self.num_pseudo_labels = len(pairs) - len(self.private)

    def answer(self, round: int, compression: str = "none") -> bytes:
        """Answer every public prompt, `generation.num_samples` times, and return the encoded `Answers` message."""
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            first, *further = self._samples(self.prompts, round, "generate", self.generation, work)
            uplink = Answers(
                round_number=round,
                client_id=self.client_id,
                num_examples=len(self.private),
                answers=tuple(first),
                further=tuple(map(tuple, further)),
            ).encode(compression)
            work.uplink_bytes = len(uplink)
        return uplink

    def evaluate(self, round: int) -> Evaluation:
        """Score the reference answers of the test set, and answer its first `num_answers` prompts greedily; score its
        options and run tasks of lm-eval where they are wanted."""
        with self.ledger.stage("evaluate", round=round, client_id=self.client_id) as work:
            score = self._likelihood(self.test)
            prompts = [pair.prompt for pair in self.test[: self.num_answers]]
            greedy = self.generation.model_copy(update={"temperature": 0.0, "num_samples": 1})
            work.tokens = score.processed_tokens
            options: list[tuple[float, ...]] = []
            if self.questions:
                options, tokens = self.model.option_nll(
                    self.adapter, self.questions, self.generation.batch_size, frozen=self.frozen
                )
                work.tokens += tokens
            (answers,) = self._samples(prompts, round, "evaluate", greedy, work)
            tasks: tuple[TaskScore, ...] = ()
            if self.harness and round in self.harness.rounds:
                with self.model.holding(self.adapter, self.frozen) as model:
                    tasks = self.harness.scores(model, self.model.name)
        return Evaluation(score.nll, score.num_tokens, score.num_bytes, tuple(answers), tuple(options), tasks)

    def score(self, round: int, examples: Sequence[Example]) -> Evaluation:
        """Score the reference answers of examples."""
        pairs = [Pair(example.prompt, example.response) for example in examples]
        with self.ledger.stage("evaluate", round=round, client_id=self.client_id) as work:
            score = self._likelihood(pairs)
            work.tokens = score.processed_tokens
        return Evaluation(score.nll, score.num_tokens, score.num_bytes, ())

    def check_finite(self, evaluation: Evaluation | None) -> None:
        """Check that training loss, adapter and test score are finite.

        Raises:
            NotFiniteError: One is infinite or NaN; the message names it and the likely cause.
        """
        diverged = "training.learning_rate is probably too high"
        if self.num_learnt and not math.isfinite(self.train_loss):
            raise NotFiniteError(f"its training loss is {self.train_loss}; {diverged}")
        if bad := non_finite(self.state()):
            raise NotFiniteError(f"{bad} is not finite after training; {diverged}")
        if evaluation is not None and not math.isfinite(evaluation.nll_sum):
            raise NotFiniteError(f"its test NLL is {evaluation.nll_sum}; {diverged}, or model.dtype too narrow")

    def label_prompts(self, round: int) -> PseudoLabels:
        """The client's own answers to the public prompts, as pseudo-labels for itself; nothing is sent."""
        once = self.generation.model_copy(update={"num_samples": 1})
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            (answers,) = self._samples(self.prompts, round, "generate", once, work)
        given = [prompt for prompt, answer in enumerate(answers) if answer]
        return PseudoLabels(
            round_number=round - 1, prompt_ids=tuple(given), responses=tuple(answers[prompt] for prompt in given)
        )

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

    def export(self, folder: Path) -> None:
        """Write the adapter, joined with the frozen one if there is one, to an existing folder in PEFT's format."""
        both = stacked([self.frozen, self.adapter], [1.0, 1.0]) if self.frozen else self.adapter
        self.model.export_adapter(both, folder)

    def _likelihood(self, pairs: Sequence[Pair]) -> Score:
        """How likely the client's model finds the responses."""
        return self.model.negative_log_likelihood(self.adapter, pairs, self.generation.batch_size, frozen=self.frozen)

    def _samples(
        self, prompts: Sequence[Prompt], round: int, stage: Stage, generation: GenerationConfig, work: Work
    ) -> list[list[str]]:
        """Answers to all prompts, `num_samples` times; the first are those of a client that draws no more."""
        generator = stream(self.seed, round, self.client_id, stage)
        if self.engine is None:
            samples = []
            for _ in range(generation.num_samples):  # batches of all draws together would round otherwise
                answers, tokens = self.model.generate(self.adapter, prompts, generation, generator, frozen=self.frozen)
                work.tokens += tokens
                samples.append(answers)
            return samples
        request = self.model.engine_request(self.adapter, prompts, generation, generator)
        asked = time.perf_counter()
        reply = self.engine.generate(request)
        work.waited_seconds = time.perf_counter() - asked
        self.ledger.add(
            LedgerRow(
                round=round,
                client_id=self.client_id,
                worker=reply.engine,
                node=reply.node,
                stage="generate" if stage == "generate" else "evaluate",
                started_at=reply.started_at,
                duration_seconds=reply.busy_seconds,
                tokens=reply.num_tokens,
                gpus=reply.gpus,
            )
        )
        answers, size = self.model.decode(reply.answers, generation.stop), len(prompts)
        return [answers[sample * size :][:size] for sample in range(generation.num_samples)]
