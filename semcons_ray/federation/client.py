"""A client: private data, its own adapter, and three things it can do. It does not know where it runs."""

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
from semcons_ray.federation.fleet import Evaluation
from semcons_ray.federation.randomness import Stage, stream
from semcons_ray.federation.weights import non_finite, pack, stacked, with_rank
from semcons_ray.messages import AdapterUpdate, Answers, PseudoLabels
from semcons_ray.metering.ledger import Ledger, LedgerRow, Work
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.engine import Engine
from semcons_ray.modeling.language_model import Adjust, LanguageModel, Pair

_ADAPTER, _OPTIMIZER, _FROZEN, _MEMORY = "adapter.", "optimizer.", "frozen.", "memory."


@dataclass(frozen=True)
class Duties:
    """What all clients of a run have in common.

    Attributes:
        prompts: Public prompts, P of them; empty where the algorithm uses none.
        test: The common test set.
        num_answers: How many test prompts are answered at an evaluation.
        seed: The experiment's.
    """

    prompts: tuple[str, ...]
    test: tuple[Example, ...]
    num_answers: int
    training: TrainingConfig
    generation: GenerationConfig
    seed: int


class Client:
    """One participant.

    Args:
        client_id: Its index, 0 to C-1.
        private: Its private examples; they leave this object only as what the model learnt from them.
        rank: LoRA rank of its adapter, at most the model's; the components beyond it stay zero.
        duties: What it has in common with the others.
        model: Base model with a place for an adapter; shared between the clients of a worker.
        ledger: Where its work is written down.
        engine: Who writes its answers; None: its own model.
    """

    def __init__(
        self,
        client_id: int,
        private: Sequence[Example],
        *,
        rank: int,
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
        self.num_answers = duties.num_answers
        self.training = duties.training
        self.generation = duties.generation
        self.seed = duties.seed
        self.model = model
        self.ledger = ledger
        self.engine = engine
        self.restore({})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become what `state` returned earlier; an empty dict is a client that has not begun."""
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
        """Everything that the next visit needs; random streams need none.

        The adapter, the optimizer's state, a frozen adapter that stands beside the base model, and what else an
        algorithm remembers.
        """
        parts = {_ADAPTER: self.adapter, _OPTIMIZER: self.optimizer, _FROZEN: self.frozen, _MEMORY: self.memory}
        return {part + key: value for part, tensors in parts.items() for key, value in tensors.items()}

    def fresh_adapter(self, round: int | None = None) -> Adapter:
        """An adapter of this client's rank whose update is zero: the common one, or one drawn for a round."""
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
        """Train the adapter on private examples joined with pseudo-labels, each of `weight` in the loss.

        Args:
            ema_decay: What the adapter of before keeps in the average of the two that the client goes on with; a client
                that has not trained yet has nothing to keep.
            adjust: What an algorithm does to gradients before each step.

        Raises:
            MessageError: A label is of no public prompt.
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
        """Answer every public prompt; returns the encoded `Answers`."""
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            answers = self._answers(self.prompts, round, "generate", self.generation, work)
            uplink = Answers(
                round_number=round, client_id=self.client_id, num_examples=len(self.private), answers=tuple(answers)
            ).encode(compression)
            work.uplink_bytes = len(uplink)
        return uplink

    def evaluate(self, round: int) -> Evaluation:
        """Score the reference answers of the test set, and answer some of its prompts."""
        with self.ledger.stage("evaluate", round=round, client_id=self.client_id) as work:
            score = self.model.negative_log_likelihood(
                self.adapter, self.test, self.generation.batch_size, frozen=self.frozen
            )
            prompts = [pair.prompt for pair in self.test[: self.num_answers]]
            greedy = self.generation.model_copy(update={"temperature": 0.0})
            work.tokens = score.processed_tokens
            answers = self._answers(prompts, round, "evaluate", greedy, work)
        return Evaluation(
            nll_sum=score.nll_sum,
            num_tokens=score.num_tokens,
            num_bytes=score.num_bytes,
            answers=tuple(answers),
        )

    def check_finite(self, evaluation: Evaluation | None) -> None:
        """Make sure that what was learnt and measured are numbers.

        Raises:
            NotFiniteError: One is infinite or NaN; names it, and the likely cause.
        """
        diverged = "training.learning_rate is probably too high"
        if self.num_learnt and not math.isfinite(self.train_loss):
            raise NotFiniteError(f"its training loss is {self.train_loss}; {diverged}")
        if bad := non_finite(self.state()):
            raise NotFiniteError(f"{bad} is not finite after training; {diverged}")
        if evaluation is not None and not math.isfinite(evaluation.nll_sum):
            raise NotFiniteError(f"its test NLL is {evaluation.nll_sum}; {diverged}, or model.dtype too narrow")

    def label_prompts(self, round: int) -> PseudoLabels:
        """The client's own answers to the public prompts, as labels to train on; nothing is sent."""
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            answers = self._answers(self.prompts, round, "generate", self.generation, work)
        given = [prompt for prompt, answer in enumerate(answers) if answer]
        return PseudoLabels(
            round_number=round - 1, prompt_ids=tuple(given), responses=tuple(answers[prompt] for prompt in given)
        )

    def upload(self, round: int, tensors: Adapter, dtype: str, compression: str) -> bytes:
        """The encoded `AdapterUpdate` of these tensors."""
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
        """Write the adapter to an existing folder, with the frozen one if there is one, in PEFT's format."""
        both = stacked([self.frozen, self.adapter], [1.0, 1.0]) if self.frozen else self.adapter
        self.model.export_adapter(both, folder)

    def _answers(
        self, prompts: Sequence[str], round: int, stage: Stage, generation: GenerationConfig, work: Work
    ) -> list[str]:
        generator = stream(self.seed, round, self.client_id, stage)
        if self.engine is None:
            answers, tokens = self.model.generate(self.adapter, prompts, generation, generator, frozen=self.frozen)
            work.tokens += tokens
            return answers
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
        return self.model.decode(reply.answers)
