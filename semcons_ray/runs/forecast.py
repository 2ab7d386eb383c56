"""What a run would send and compute, calculated from its plan.

Who takes part in which round and the bytes of public prompts are exact. The rest is estimated: answers are taken to be
as long as the responses of the private data, cut at `generation.max_new_tokens`, every prompt to give a pseudo-label,
and weights not to be compressed. Tokens are those of models that are here. An algorithm of one's own is taken to send
what its class variables say: answers as semantic consensus does (`forms_consensus`), token probabilities as the
exchange of those does (`exchanges_tokens`), adapters as FedAvg does (`averages_weights`), or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from math import prod
from statistics import fmean

from semcons_ray.data.examples import Example
from semcons_ray.data.split import DataSplit
from semcons_ray.federation.algorithms import build_algorithm
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.token_probabilities import PROBABILITY, TOKEN
from semcons_ray.federation.weights import Shapes
from semcons_ray.messages import NO_LABELS, NO_TARGETS, Answers, PseudoLabels, PublicPrompts
from semcons_ray.modeling.chat import ChatFormat, Encoded, read_formats
from semcons_ray.runs.assembly import LARGE_PARAMETERS, cohort_of, count_parameters
from semcons_ray.runs.experiment import Plan

CHARS_A_TOKEN = 4
"""Characters of a token of which nothing is known."""

ID_BYTES = 3
"""Bytes of a token id under 65,536 in a message."""

MEASURED_TOKENS = 16
"""Tokens of an answer when the speed of answering is measured."""

SAMPLE = 1000
"""Most texts of a kind whose tokens are counted; further ones are taken to be as long on average."""


@dataclass(frozen=True)
class Load:
    """What is sent and computed.

    Attributes:
        uplink_bytes: From clients to the server.
        downlink_bytes: From the server to clients.
        trained: Tokens of examples that are trained on.
        generated: Tokens of answers.
        scored: Tokens of test examples that are scored.
    """

    uplink_bytes: float = 0.0
    downlink_bytes: float = 0.0
    trained: float = 0.0
    generated: float = 0.0
    scored: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Load:
        return Load(*(times * one for one in astuple(self)))


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one worker that has the machine to itself.

    Attributes:
        trained: In training.
        generated: In answering; the time to read prompts is part of it.
        scored: In scoring the test set.
        parameters: Size of the model with which it was measured.
    """

    trained: float
    generated: float
    scored: float
    parameters: int

    def seconds(self, load: Load, parameters: int) -> float:
        """Seconds that a load takes with a model of this size."""
        work = load.trained / self.trained + load.generated / self.generated + load.scored / self.scored
        return work * parameters / self.parameters


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens by a model's tokenizer, but for `texts` and `answer_chars`.

    Attributes:
        example: Of a private example.
        texts: Texts that a private example gives; see `ChatFormat.parts`.
        prompt: Of a public prompt.
        answer: Of an answer.
        test: Of a test example.
        answer_chars: Most characters of an answer.
    """

    example: float
    texts: float
    prompt: float
    answer: float
    test: float
    answer_chars: int

    @classmethod
    def of(cls, chat: ChatFormat, split: DataSplit, max_new_tokens: int) -> Lengths:
        """The lengths of a run's texts."""
        private = _sample([example for share in split.private for example in share])
        texts = [_encoded(chat, example) for example in private]
        # The last answer of each, as only that stands for an answer to a public prompt.
        answers = [end - begin for begin, end in (parts[-1].learnt[-1] for parts in texts)]
        chars = fmean(len(example.response) for example in private) / fmean(answers)
        return cls(
            example=fmean(sum(len(part.ids) for part in parts) for parts in texts),
            texts=fmean(map(len, texts)),
            prompt=fmean(len(chat.prompt_ids(example.prompt)) for example in _sample(split.public)),
            answer=fmean(min(answer, max_new_tokens) for answer in answers),
            test=fmean(sum(len(part.ids) for part in _encoded(chat, example)) for example in _sample(split.test)),
            answer_chars=int(max_new_tokens * chars) + 1,
        )

    @classmethod
    def elsewhere(cls, max_new_tokens: int) -> Lengths:
        """Those of a model that is not here, whose tokens are not counted."""
        return cls(0.0, 1.0, 0.0, 0.0, 0.0, answer_chars=CHARS_A_TOKEN * max_new_tokens)


def _encoded(chat: ChatFormat, example: Example) -> list[Encoded]:
    return [chat.encode(*part) for part in chat.parts(example.prompt, example.response)]


def _sample(examples: Sequence[Example]) -> Sequence[Example]:
    return examples[:: -(-len(examples) // SAMPLE)]


class Forecast:
    """What a run would send and compute.

    Args:
        plan: What it would do.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = plan.placement.config
        self.models, self._ranks = self.config.client_models(), self.config.client_ranks()
        model = self.config.model
        formats: dict[str, ChatFormat] = {}
        if plan.models:
            formats = read_formats(
                plan.models,
                max_length=model.num_tokens,
                system_prompt=model.system_prompt,
                template_kwargs=model.chat_template_kwargs,
                template_date=model.template_date,
            )
        self.private = [example for share in plan.split.private for example in share]
        self._num_private = plan.split.num_private
        self._training_of, self._generation_of = self.config.client_training(), self.config.client_generation()
        kinds = [(name, self._generation_of[client].max_new_tokens) for client, name in enumerate(self.models)]
        found = {
            (name, most): Lengths.of(formats[name], plan.split, most) if name in formats else Lengths.elsewhere(most)
            for name, most in set(kinds)
        }
        self._lengths = [found[kind] for kind in kinds]
        self._adapters: dict[str, tuple[float, float]] = {}
        self.parameters = {name: count_parameters(folder) for name, folder in plan.models.items()}
        cohort = cohort_of(self.config)
        self._algorithm = build_algorithm(self.config.algorithm, cohort, self._ranks, self.config.num_rounds)
        alone = self.config.algorithm.name == "centralized"
        rounds = range(1, self.config.num_rounds + 1)
        self.participants = {round: (0,) if alone else cohort.sample(round) for round in rounds}
        self.by_client = [self._base(), *map(self._round, rounds)]
        """The load of each client in each round; in round 0 the base model is measured."""

    @property
    def rounds(self) -> list[Load]:
        """The load of each round."""
        return [sum(loads.values(), Load()) for loads in self.by_client]

    @property
    def total(self) -> Load:
        """The load of the whole run."""
        return sum(self.rounds, Load())

    @property
    def operations(self) -> float:
        """Floating-point operations of the whole run.

        A token takes two for each parameter forward and, in training, two backward, since base weights are frozen; two
        more where activations are computed again.
        """
        return sum(
            self.parameters[self.models[client]] * self._operations(client, load)
            for loads in self.by_client
            for client, load in loads.items()
            if self.models[client] in self.parameters
        )

    def _operations(self, client: int, load: Load) -> float:
        """Floating-point operations for each parameter."""
        training = 6 if self._training_of[client].gradient_checkpointing else 4
        read = self._lengths[client].prompt / self._lengths[client].answer * load.generated
        return training * load.trained + 2 * (read + load.generated + load.scored)

    def seconds(self, speed: Speed) -> float:
        """Seconds of the whole run: in each round, those of the worker that has the most to do here."""
        together = sum if self.config.resources.fleet == "local" else max
        return sum(
            together(
                sum(
                    speed.seconds(loads[client], self.parameters[worker.model])
                    for client in worker.clients
                    if client in loads and not worker.elsewhere
                )
                for worker in self.plan.placement.workers
            )
            for loads in self.by_client
        )

    @cached_property
    def prompt_bytes(self) -> int:
        """Bytes of the public prompts, which are exact."""
        message = PublicPrompts(prompts=tuple(example.prompt for example in self.plan.split.public))
        return len(message.encode(self.config.algorithm.compression))

    @cached_property
    def _likely_answers(self) -> tuple[str, ...]:
        most = self._lengths[0].answer_chars
        return tuple(
            self.private[index % len(self.private)].response[:most] for index in range(len(self.plan.split.public))
        )

    @cached_property
    def _answer_bytes(self) -> int:
        message = Answers(round_number=1, client_id=0, num_examples=1, answers=self._likely_answers)
        return len(message.encode(self.config.algorithm.compression))

    def _token_bytes(self, client: int) -> float:
        """Of token probabilities: each token of an answer, and those that are likely at its place."""
        top_k = getattr(self._algorithm, "top_k", 1)
        likely = top_k * (TOKEN.itemsize + PROBABILITY.itemsize)
        return len(self.plan.split.public) * self._lengths[client].answer * (ID_BYTES + likely)

    def _bytes_of_answers(self, client: int) -> int:
        own = self._generation_of[client]
        beside = (own.send_draws == "choice") + 4 * own.send_confidence  # a count is a byte, if it is under 128
        return own.num_sent * (self._answer_bytes + beside * len(self._likely_answers))

    @cached_property
    def _label_bytes(self) -> int:
        ids = tuple(range(len(self._likely_answers)))
        message = PseudoLabels(round_number=1, prompt_ids=ids, responses=self._likely_answers)
        return len(message.encode(self.config.algorithm.compression))

    def _adapter_bytes(self, name: str) -> tuple[float, float]:
        """Bytes of a model's adapter as it is sent: for each unit of its rank, and of modules trained whole."""
        import torch

        from semcons_ray.modeling.lora import trained_shapes
        from semcons_ray.modeling.model_folder import read_config

        lora, each = self.config.model.lora, getattr(torch, self.config.algorithm.weight_dtype).itemsize
        sent: Shapes = trained_shapes(read_config(self.plan.models[name]), lora, name)
        if isinstance(self._algorithm, FedAvgLora):
            sent = self._algorithm.exchanged(sent)
        factors = sum(prod(shape) for key, shape in sent.items() if "lora_" in key)
        whole = sum(prod(shape) for key, shape in sent.items() if "lora_" not in key)
        return float(each * factors / lora.rank), float(each * whole)

    def _weight_bytes(self, client: int, rank: int) -> float:
        name = self.models[client]
        if name not in self._adapters:
            self._adapters[name] = self._adapter_bytes(name)
        of_rank, whole = self._adapters[name]
        return of_rank * rank + whole

    def _base(self) -> dict[int, Load]:
        first = {model: client for client, model in reversed([*enumerate(self.models)])}
        loads = {client: self._evaluation(client) for client in first.values()}
        return self._with_own_tests(loads, range(len(self.models)))

    def _round(self, round: int) -> dict[int, Load]:
        loads = {
            client: self._training(client, round) + self._traffic(client, round) for client in self.participants[round]
        }
        measured = self._measured(round)
        for client in measured:
            loads[client] = loads.get(client, Load()) + self._evaluation(client)
        # One model is measured for all that have it, but each on its own test set.
        everyone = self._has_one_model(round) or self.config.algorithm.name == "centralized"
        return self._with_own_tests(loads, (range(len(self.models)) if everyone else measured) if measured else ())

    def _with_own_tests(self, loads: dict[int, Load], clients: Sequence[int]) -> dict[int, Load]:
        """Loads with those of scoring clients' own test sets."""
        own = dict(enumerate(self.plan.split.client_test))
        for client in clients:
            scored = len(own.get(client, ())) * self._lengths[client].test
            loads[client] = loads.get(client, Load()) + Load(scored=scored)
        return loads

    def _measured(self, round: int) -> Sequence[int]:
        """Whose models are measured after a round; where all have one, one of each rank."""
        if round % self.config.evaluation.every and round != self.config.num_rounds:
            return ()
        if self._has_one_model(round):
            return [*{rank: client for client, rank in reversed([*enumerate(self._ranks)])}.values()]
        return self.participants[round]

    def _evaluation(self, client: int) -> Load:
        lengths, test, evaluation = self._lengths[client], self.plan.split.test, self.config.evaluation
        texts = len(test)
        if "multiple_choice" in evaluation.metrics:
            texts += sum(len(example.options) for example in test)
        answered = min(evaluation.num_answers, len(test))
        return Load(generated=answered * lengths.answer, scored=texts * lengths.test)

    def _training(self, client: int, round: int) -> Load:
        training, algorithm = self._training_of[client], self.config.algorithm
        lengths, prompts = self._lengths[client], len(self.plan.split.public)
        labels = prompts if self._learns(round) and algorithm.pseudo_label_weight else 0
        examples = self._num_private[client]
        tokens = examples * lengths.example + labels * (lengths.prompt + lengths.answer)
        passes = float(training.local_epochs)
        if training.local_steps:
            passes = training.local_steps * training.step_size / max(examples * lengths.texts + labels, 1)
        answers = prompts if self._sends_answers(round) or (self._labels_itself and self._learns(round)) else 0
        if self._sends_answers(round) and not algorithm.exchanges_tokens:
            answers *= self._generation_of[client].num_samples
        scores = algorithm.exchanges_tokens or self._generation_of[client].send_confidence
        scored = answers * (lengths.prompt + lengths.answer) if scores and self._sends_answers(round) else 0.0
        return Load(trained=passes * tokens, generated=answers * lengths.answer, scored=scored)

    def _traffic(self, client: int, round: int) -> Load:
        algorithm = self.config.algorithm
        up, down = 0.0, 0.0
        if algorithm.exchanges_tokens:
            up += self._token_bytes(client) if self._sends_answers(round) else 0
            down += self._token_bytes(client) if self._learns(round) else len(NO_TARGETS.encode(algorithm.compression))
        elif algorithm.learns_prompts and not self._labels_itself:
            up += self._bytes_of_answers(client) if self._sends_answers(round) else 0
            down += self._label_bytes if self._learns(round) else len(NO_LABELS.encode(algorithm.compression))
        if self._sends_weights(round):
            up += self._weight_bytes(client, self._ranks[client])
            if algorithm.name != "one_shot_fedavg_lora" and round > 1:
                down += self._weight_bytes(client, self._received_rank(client, round))
        if algorithm.learns_prompts and not any(client in self.participants[before] for before in range(1, round)):
            down += self.prompt_bytes
        return Load(uplink_bytes=up, downlink_bytes=down)

    @property
    def _labels_itself(self) -> bool:
        algorithm = self.config.algorithm
        return algorithm.self_labels or algorithm.rule == "own_answer"

    def _learns(self, round: int) -> bool:
        algorithm = self.config.algorithm
        return algorithm.learns_prompts and round > algorithm.exchanges(self.config.num_rounds).start

    def _sends_answers(self, round: int) -> bool:
        algorithm = self.config.algorithm
        exchanges = round in algorithm.exchanges(self.config.num_rounds)
        return algorithm.learns_prompts and not self._labels_itself and exchanges

    def _sends_weights(self, round: int) -> bool:
        algorithm = self.config.algorithm
        at_the_end = algorithm.name == "one_shot_fedavg_lora"
        return algorithm.averages_weights and (not at_the_end or round == self.config.num_rounds)

    def _has_one_model(self, round: int) -> bool:
        """Whether all clients have the same model after a round, but for its rank."""
        return self._sends_weights(round) and not self.config.algorithm.is_so("own_models")

    def _received_rank(self, client: int, round: int) -> int:
        """Rank of what a client is sent, if nobody is lost."""
        if not isinstance(self._algorithm, FedAvgLora):
            return self._ranks[client]
        last = max((before for before in range(1, round) if client in self.participants[before]), default=1)
        missed = [[self._ranks[other] for other in self.participants[before]] for before in range(last, round)]
        return self._algorithm.received_rank(self._ranks[client], missed)


def measure(forecast: Forecast) -> Speed | str:
    """The speed of one worker on this machine, by a batch of each kind of work with the smallest model.

    Returns:
        The speed, or why it is not measured.
    """
    config, parameters = forecast.config, forecast.parameters
    if not parameters:
        return "all answers come from elsewhere"
    name = min(parameters, key=parameters.__getitem__)
    if config.generation.engine != "transformers" or config.sharding.models:
        return "generation engines and divided models are not measured"
    if config.resources.device == "cpu" and parameters[name] > LARGE_PARAMETERS:
        return f"on a CPU, {name} is not measured"
    import numpy as np
    import torch

    from semcons_ray.modeling.client_model import Pair
    from semcons_ray.modeling.language_model import LanguageModel

    if config.resources.device == "cuda" and not torch.cuda.is_available():
        return "this machine has no GPU"
    torch.set_num_threads(config.resources.threads_per_worker)
    folder, device = str(forecast.plan.models[name]), config.resources.device
    model = LanguageModel.of(config.model, folder, device=device, trainings=[config.training])
    training = config.training.model_copy(update={"local_steps": 1, "gradient_accumulation_steps": 1})
    generation = config.generation.model_copy(update={"max_new_tokens": MEASURED_TOKENS})
    pairs = [Pair(example.prompt, example.response) for example in forecast.private]
    batch, asked = pairs[: training.batch_size], [pair.prompt for pair in pairs[: generation.batch_size]]

    def rate(work: Callable[[], int]) -> float:
        began = time.perf_counter()
        return work() / (time.perf_counter() - began)

    adapter, random = model.fresh_adapter(), np.random.default_rng(0)
    return Speed(
        generated=rate(lambda: model.generate(adapter, asked, generation, random)[1]),
        scored=rate(lambda: model.negative_log_likelihood(adapter, batch, len(batch)).processed_tokens),
        trained=rate(lambda: model.fine_tune(adapter, batch, training, random).tokens),
        parameters=parameters[name],
    )
