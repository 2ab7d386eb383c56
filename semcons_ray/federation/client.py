"""A client: private data, its own adapter, and three things it can do. It does not know where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from semcons_ray.config import GenerationConfig, TrainingConfig
from semcons_ray.data.examples import Example
from semcons_ray.federation.fleet import Evaluation
from semcons_ray.federation.randomness import stream
from semcons_ray.messages import Answers, PseudoLabels
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.language_model import LanguageModel, Pair

_ADAPTER, _OPTIMIZER = "adapter.", "optimizer."


class Client:
    """One participant.

    Args:
        client_id: Its index, 0 to C-1.
        private: Its private examples; they leave this object only as what the model learnt from them.
        prompts: Public prompts, P of them; empty where the algorithm uses none.
        test: The common test set.
        num_answers: How many test prompts are answered at an evaluation.
        model: Base model with a place for an adapter; shared between the clients of a worker.
        seed: The experiment's.
        ledger: Where its work is written down.
    """

    def __init__(
        self,
        client_id: int,
        *,
        private: Sequence[Example],
        prompts: Sequence[str],
        test: Sequence[Example],
        num_answers: int,
        model: LanguageModel,
        training: TrainingConfig,
        generation: GenerationConfig,
        seed: int,
        ledger: Ledger,
    ) -> None:
        self.client_id = client_id
        self.private = [Pair(example.prompt, example.response) for example in private]
        self.prompts = tuple(prompts)
        self.test = [Pair(example.prompt, example.response) for example in test]
        self.num_answers = num_answers
        self.model = model
        self.training = training
        self.generation = generation
        self.seed = seed
        self.ledger = ledger
        self.restore({})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become what `state` returned earlier; an empty dict is a client that has not begun."""
        self.adapter = {key[len(_ADAPTER) :]: value for key, value in tensors.items() if key.startswith(_ADAPTER)}
        self.optimizer = {key[len(_OPTIMIZER) :]: value for key, value in tensors.items() if key.startswith(_OPTIMIZER)}
        if not self.adapter:
            self.adapter = self.model.fresh_adapter()
        self.train_loss = math.nan
        self.num_pseudo_labels = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next visit needs: adapter and optimizer state (random streams need none)."""
        return {
            **{_ADAPTER + key: value for key, value in self.adapter.items()},
            **{_OPTIMIZER + key: value for key, value in self.optimizer.items()},
        }

    def fine_tune(self, round: int, labels: PseudoLabels, *, weight: float = 1.0, downlink_bytes: int = 0) -> None:
        """Train the adapter on private examples joined with pseudo-labels, each of `weight` in the loss."""
        pairs = list(self.private)
        if weight > 0:
            answered = zip(labels.prompt_ids, labels.responses, strict=True)
            pairs += [Pair(self.prompts[prompt_id], response, weight) for prompt_id, response in answered]
        with self.ledger.stage("fine_tune", round=round, client_id=self.client_id) as work:
            result = self.model.fine_tune(
                self.adapter,
                pairs,
                self.training,
                stream(self.seed, round, self.client_id, "fine_tune"),
                self.optimizer,
            )
            work.tokens = result.tokens
            work.downlink_bytes = downlink_bytes
        self.optimizer = result.optimizer
        self.train_loss = result.loss
        self.num_pseudo_labels = len(pairs) - len(self.private)

    def answer(self, round: int, compression: str = "none") -> bytes:
        """Answer every public prompt; returns the encoded `Answers`."""
        with self.ledger.stage("generate", round=round, client_id=self.client_id) as work:
            answers, work.tokens = self.model.generate(
                self.adapter, self.prompts, self.generation, stream(self.seed, round, self.client_id, "generate")
            )
            uplink = Answers(
                round_number=round, client_id=self.client_id, num_examples=len(self.private), answers=tuple(answers)
            ).encode(compression)
            work.uplink_bytes = len(uplink)
        return uplink

    def evaluate(self, round: int) -> Evaluation:
        """Score the reference answers of the test set, and answer some of its prompts."""
        with self.ledger.stage("evaluate", round=round, client_id=self.client_id) as work:
            nll_sum, num_tokens, scored = self.model.negative_log_likelihood(
                self.adapter, self.test, self.generation.batch_size
            )
            answers, generated = self.model.generate(
                self.adapter,
                [pair.prompt for pair in self.test[: self.num_answers]],
                self.generation,
                stream(self.seed, round, self.client_id, "evaluate"),
            )
            work.tokens = scored + generated
        return Evaluation(nll_sum=nll_sum, num_tokens=num_tokens, answers=tuple(answers))
