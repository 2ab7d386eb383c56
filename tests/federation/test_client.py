"""A client with a tiny real model: what it keeps, sends and averages."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import MessageError, NotFiniteError
from semcons_ray.federation.adapter_model import AdapterModel
from semcons_ray.federation.client import Client, Duties
from semcons_ray.federation.fleet import Evaluation
from semcons_ray.federation.opinions import choices
from semcons_ray.federation.randomness import stream
from semcons_ray.federation.weights import rank_of, stacked, unpack, with_rank
from semcons_ray.messages import NO_LABELS, AdapterUpdate, Answers, PseudoLabels
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.engine import EngineReply, EngineRequest, Told
from semcons_ray.modeling.handover import HandOver
from semcons_ray.modeling.language_model import LanguageModel, Pair, Parameters
from tests.federation.rows import work
from tests.parrots import Parrot

EXAMPLES = [Example(f"add one and {word}", f"it is {word}", "add") for word in ("two", "three", "four", "five")]
MakeClient = Callable[..., Client]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return LanguageModel(str(tiny_llama), lora=LoraConfig(rank=4), dtype="float32", device="cpu", max_length=64)


@pytest.fixture
def make_client(model: LanguageModel) -> MakeClient:
    def make(rank: int = 4, **training: Any) -> Client:
        ledger = Ledger("worker-0", "here")
        settings = TrainingConfig.model_validate({"learning_rate": 1e-2, "batch_size": 2, **training})
        return Client(
            1,
            EXAMPLES,
            generation=GenerationConfig(max_new_tokens=4, temperature=0.0),
            duties=Duties(
                prompts=("add one and six", "spell two"), test=tuple(EXAMPLES[:2]), num_answers=1, seed=0
            ),
            model=AdapterModel(1, model, rank=rank, training=settings, batch_size=32, seed=0, ledger=ledger),
            ledger=ledger,
        )

    return make


PRIVATE = [Pair(example.prompt, example.response) for example in EXAMPLES]


COLUMNS = ("tokens", "uplink_bytes", "downlink_bytes")


def after(client: Client, state: dict[str, torch.Tensor], round: int, **settings: Any) -> dict[str, torch.Tensor]:
    client.restore(state)
    client.fine_tune(round, NO_LABELS, **settings)
    return adapted(client).state()


def adapted(client: Client) -> AdapterModel:
    assert isinstance(client.model, AdapterModel)
    return client.model


def test_a_moving_average_begins_in_the_second_round_and_is_half_of_each(make_client: MakeClient) -> None:
    client = make_client()
    first = after(client, {}, 1, ema_decay=0.25)
    assert all(torch.equal(value, first[key]) for key, value in after(client, {}, 1).items())
    trained = after(client, first, 2)
    for key, value in after(client, first, 2, ema_decay=0.25).items():
        torch.testing.assert_close(value, 0.25 * first[key] + 0.75 * trained[key])
        assert not torch.equal(value, trained[key])


def test_all_that_a_client_is_goes_into_its_state_and_comes_back(make_client: MakeClient) -> None:
    client = make_client(keep_optimizer=True)
    client.fine_tune(1, NO_LABELS)
    client.frozen, client.memory["own"] = dict(client.adapter), torch.ones(2)
    state = adapted(client).state()
    other = make_client()
    other.restore(state)
    assert adapted(other).state().keys() == state.keys()
    assert all(torch.equal(adapted(other).state()[key], value) for key, value in state.items())
    assert adapted(other).optimizer
    assert rank_of(other.frozen) == 4
    other.restore({})
    assert not (other.frozen or other.memory or adapted(other).optimizer)


def test_a_client_of_a_lower_rank_is_the_padded_one_whose_further_components_stay_zero(make_client: MakeClient) -> None:
    client = make_client(rank=2)
    client.fine_tune(1, NO_LABELS)
    assert rank_of(client.adapter) == 2
    padded = make_client()
    padded.adapter = with_rank(padded.fresh_adapter(), 2)
    padded.adapter = with_rank(padded.adapter, 4)
    padded.fine_tune(1, NO_LABELS)
    for key, value in with_rank(client.adapter, 4).items():
        torch.testing.assert_close(padded.adapter[key], value)
    assert client.evaluate(1).nll_sum == pytest.approx(padded.evaluate(1).nll_sum)


def test_a_frozen_adapter_beside_the_base_is_that_adapter(make_client: MakeClient) -> None:
    client = make_client()
    client.fine_tune(1, NO_LABELS)
    evaluated = client.evaluate(1)
    client.frozen, client.adapter = client.adapter, client.fresh_adapter(2)
    beside = client.evaluate(1)
    assert beside.nll_sum == pytest.approx(evaluated.nll_sum, rel=1e-5)
    assert beside.answers == evaluated.answers
    # Training goes on from there: the same first loss, and the stack of both is the model.
    client.fine_tune(2, NO_LABELS)
    both = make_client()
    both.adapter = stacked([client.frozen, client.adapter], [1.0, 1.0])
    assert client.evaluate(2).nll_sum < evaluated.nll_sum
    both.frozen, both.adapter = both.adapter, both.fresh_adapter()
    assert both.evaluate(2).nll_sum == pytest.approx(client.evaluate(2).nll_sum, rel=1e-5)


def test_adapters_drawn_for_a_round_differ_by_round_and_change_nothing_yet(make_client: MakeClient) -> None:
    client = make_client()
    first, second, again = client.fresh_adapter(1), client.fresh_adapter(2), client.fresh_adapter(1)
    some = next(key for key in first if "lora_A" in key)
    bound = first[some].shape[1] ** -0.5
    assert torch.equal(first[some], again[some])
    assert not torch.equal(first[some], second[some])
    assert 0.8 * bound < first[some].abs().max() <= bound
    assert all(not value.any() for key, value in first.items() if "lora_B" in key)


def test_a_label_of_no_public_prompt_is_refused(make_client: MakeClient) -> None:
    client = make_client()
    before = adapted(client).state()
    for prompt_id in (2, 2**62):
        labels = PseudoLabels(round_number=1, prompt_ids=(0, prompt_id), responses=("one", "two"))
        for weight in (1.0, 0.0):
            with pytest.raises(MessageError, match=f"a label for prompt {prompt_id}, but there are 2"):
                client.fine_tune(2, labels, weight=weight)
    assert all(torch.equal(value, before[key]) for key, value in adapted(client).state().items())


def test_its_own_answers_are_labels_and_go_nowhere(make_client: MakeClient) -> None:
    client = make_client()
    labels = client.label_prompts(2)
    assert labels.round_number == 1
    sent = Answers.decode(client.answer(2))
    assert dict(zip(labels.prompt_ids, labels.responses, strict=True)) == {
        prompt: answer for prompt, answer in enumerate(sent.answers) if answer
    }
    own, answered = client.ledger.take()
    assert (own.stage, own.uplink_bytes) == ("generate", 0)
    assert answered.uplink_bytes > 0


def test_an_upload_is_what_it_says_and_counted(make_client: MakeClient) -> None:
    client = make_client()
    uplink = client.upload(3, {"w": torch.tensor([0.5, -1.0])}, "float16", "none")
    update = AdapterUpdate.decode(uplink)
    assert (update.round_number, update.client_id, update.num_examples) == (3, 1, 4)
    assert unpack(update.tensors)["w"].tolist() == [0.5, -1.0]
    [row] = client.ledger.take()
    assert (row.stage, row.uplink_bytes) == ("encode", len(uplink))


def test_test_prompts_are_answered_greedily_whatever_the_temperature(
    model: LanguageModel, make_client: MakeClient
) -> None:
    client = make_client()
    greedy = client.evaluate(1).answers
    client.generation = GenerationConfig(max_new_tokens=4, temperature=5.0)
    assert client.evaluate(1).answers == greedy
    assert client.label_prompts(2).responses != make_client().label_prompts(2).responses


def test_a_client_whose_numbers_are_no_longer_finite_has_failed(make_client: MakeClient) -> None:
    client = make_client()
    client.fine_tune(1, NO_LABELS)
    evaluation = client.evaluate(1)
    client.check_finite(evaluation)
    with pytest.raises(NotFiniteError, match=r"its test NLL is nan; training\.learning_rate .* or model\.dtype"):
        client.check_finite(msgspec.structs.replace(evaluation, nll=(1.0, math.nan)))
    client.train_loss = math.inf
    with pytest.raises(NotFiniteError, match=r"its training loss is inf; training\.learning_rate is probably too high"):
        client.check_finite(None)
    client.train_loss = 1.0
    some = next(iter(client.adapter))
    client.adapter[some][0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=f"adapter.{some} is not finite"):
        client.check_finite(None)


def test_an_update_that_overflows_its_type_on_the_wire_is_the_clients_failure(make_client: MakeClient) -> None:
    client = make_client()
    with pytest.raises(NotFiniteError, match=r"w is not finite; .*set algorithm\.weight_dtype to bfloat16 or float32"):
        client.upload(1, {"w": torch.tensor([70000.0])}, "float16", "none")
    assert unpack(AdapterUpdate.decode(client.upload(1, {"w": torch.tensor([70000.0])}, "bfloat16", "none")).tensors)


def test_the_bytes_that_are_scored_are_those_of_the_answers(make_client: MakeClient) -> None:
    assert make_client().evaluate(1).num_bytes == (len("it is two"), len("it is three"))


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.0])
def test_a_local_update_is_the_models_over_private_examples_and_weighted_labels(
    model: LanguageModel, make_client: MakeClient, weight: float
) -> None:
    """In a second round, with everything that goes into one: labels, optimizer, frozen adapter, changed gradients."""

    def halve(parameters: Parameters) -> None:
        for key, parameter in parameters.items():
            if "lora_B" in key and parameter.grad is not None:
                parameter.grad *= 0.5

    client = make_client(keep_optimizer=True)
    client.frozen = {key: value + 0.1 for key, value in client.fresh_adapter(7).items()}
    client.fine_tune(1, NO_LABELS)
    client.restore(adapted(client).state())
    adapter, pairs = dict(client.adapter), [*PRIVATE]
    # Training changes it in place.
    optimizer = {key: value.clone() for key, value in adapted(client).optimizer.items()}
    if weight:
        pairs.append(Pair("spell two", "t w o", weight))
    expected = model.fine_tune(
        adapter, pairs, adapted(client).training, stream(0, 2, 1, "fine_tune"), optimizer, frozen=client.frozen,
        adjust=halve,
    )  # fmt: skip
    client.ledger.take()
    labels = PseudoLabels(round_number=1, prompt_ids=(1,), responses=("t w o",))
    client.fine_tune(2, labels, weight=weight, downlink_bytes=77, adjust=halve)
    assert all(torch.equal(client.adapter[key], value) for key, value in adapter.items())
    optimizer = adapted(client).optimizer
    assert all(torch.equal(optimizer[key], value) for key, value in expected.optimizer.items())
    assert optimizer.keys() == expected.optimizer.keys()
    assert (client.train_loss, client.num_pseudo_labels) == (expected.loss, int(weight > 0))
    assert work(client.ledger.take(), *COLUMNS) == [("fine_tune", 2, 1, "worker-0", "here", expected.tokens, 0, 77)]


def test_a_client_that_came_back_has_not_trained_in_this_round(make_client: MakeClient) -> None:
    client = make_client()
    client.fine_tune(1, PseudoLabels(round_number=0, prompt_ids=(0,), responses=("one",)))
    assert client.num_pseudo_labels == 1
    assert [row.downlink_bytes for row in client.ledger.take()] == [0]  # where nothing was sent
    client.train_loss = math.inf
    client.restore(adapted(client).state())
    assert client.train_loss is None
    assert client.num_pseudo_labels == 0
    client.check_finite(None)  # nothing was trained, so a loss of NaN is no failure


def test_answers_and_scores_are_the_models_and_their_tokens_are_counted(
    model: LanguageModel, make_client: MakeClient
) -> None:
    client = make_client()
    client.generation = GenerationConfig(max_new_tokens=4)
    client.frozen = {key: value + 0.1 for key, value in client.fresh_adapter(7).items()}
    client.fine_tune(1, NO_LABELS)
    client.ledger.take()

    def generated(prompts: list[str], temperature: float, stage: Any) -> tuple[list[str], int]:
        settings = GenerationConfig(max_new_tokens=4, temperature=temperature)
        return model.generate(client.adapter, prompts, settings, stream(0, 3, 1, stage), frozen=client.frozen)

    answers, tokens = generated(["add one and six", "spell two"], 1.0, "generate")
    message = Answers(round_number=3, client_id=1, num_examples=4, answers=tuple(answers))
    assert client.answer(3) == message.encode("none")
    assert client.answer(3, "zstd") == message.encode("zstd")
    assert client.label_prompts(3).responses == tuple(answer for answer in answers if answer)
    score = model.negative_log_likelihood(client.adapter, PRIVATE[:2], 32, frozen=client.frozen)
    greedy, greedy_tokens = generated(["add one and two"], 0.0, "evaluate")
    assert client.evaluate(3) == Evaluation(score.nll, score.num_tokens, score.num_bytes, tuple(greedy))
    assert work(client.ledger.take(), *COLUMNS) == [
        ("generate", 3, 1, "worker-0", "here", tokens, len(message.encode("none")), 0),
        ("generate", 3, 1, "worker-0", "here", tokens, len(message.encode("zstd")), 0),
        ("generate", 3, 1, "worker-0", "here", tokens, 0, 0),
        ("evaluate", 3, 1, "worker-0", "here", score.processed_tokens + greedy_tokens, 0, 0),
    ]


def test_the_first_of_several_samples_is_the_answer_of_one(make_client: MakeClient) -> None:
    client = make_client()
    client.generation = GenerationConfig(max_new_tokens=6)
    client.fine_tune(1, NO_LABELS)
    client.ledger.take()
    sent, labels, evaluation = client.answer(3), client.label_prompts(3), client.evaluate(3)
    (row, *_) = client.ledger.take()
    one = Answers.decode(sent)
    assert one.further == ()
    client.generation = GenerationConfig(max_new_tokens=6, num_samples=3)
    sent = client.answer(3)
    several = Answers.decode(sent)
    assert several.answers == one.answers
    assert len(several.further) == 2
    assert len({one.answers, *several.further}) == 3  # each is drawn anew
    assert (client.label_prompts(3), client.evaluate(3)) == (labels, evaluation)
    ((*_, tokens, num_bytes), *_) = work(client.ledger.take(), "tokens", "uplink_bytes")
    assert 2 * row.tokens < tokens <= 3 * 2 * 6
    assert num_bytes == len(sent)


def test_a_client_chooses_from_its_own_draws(make_client: MakeClient) -> None:
    client = make_client()
    client.generation = GenerationConfig(max_new_tokens=1, top_k=2, num_samples=6)
    every = Answers.decode(client.answer(3))
    client.generation = client.generation.model_copy(update={"send_draws": "choice"})
    client.ledger.take()
    sent = client.answer(3)
    message = Answers.decode(sent)
    assert ([*message.answers], [*message.counts]) == choices(every.samples)
    assert max(message.counts) > 1
    assert work(client.ledger.take(), "uplink_bytes")[0][-1] == len(sent) < len(every.encode())
    client.label_prompts(3)  # of one draw, from which there is nothing to choose


def test_confidence_is_the_mean_log_likelihood_of_what_is_sent(make_client: MakeClient) -> None:
    client = make_client()
    client.fine_tune(1, NO_LABELS)
    client.generation = GenerationConfig(max_new_tokens=3, num_samples=4, top_k=2, send_draws="choice")
    plain = Answers.decode(client.answer(2))
    client.ledger.take()
    client.generation = client.generation.model_copy(update={"send_confidence": True})
    sent = client.answer(2)
    message = Answers.decode(sent)
    assert (message.samples, message.counts) == (plain.samples, plain.counts)
    for texts, values in zip(message.samples, message.confidences, strict=True):
        for prompt, text, value in zip(client.prompts, texts, values, strict=True):
            if not text:
                assert math.isnan(value)
                continue
            score = adapted(client).score([Pair(prompt, text)])
            assert value == pytest.approx(-score.nll_sum / score.num_tokens[0], rel=1e-5)
    (row,) = client.ledger.take()
    assert row.uplink_bytes == len(sent) == len(plain.encode()) + 11 + 2 + len(message.confidence)
    client.model = Parrot(Path("nowhere"))
    client.model.restore({})
    assert Answers.decode(client.answer(2)).confidence == b""  # it tells no likelihoods


class OneWord:
    """An engine that answers every prompt but the last with the first letters of its own name, and takes 5 seconds.

    How likely that is, it knows from the client's model.
    """

    def __init__(self, client: Client) -> None:
        self.model = adapted(client)
        self.ids = self.model.base.tokenizer("engine")["input_ids"]
        self.asked, self.clock = list[EngineRequest](), 100.0
        self.model.handover = HandOver(self, self.model.base)

    def generate(self, request: EngineRequest) -> EngineReply:
        self.asked.append(request)
        self.clock += 5.0
        answers = [self.ids for _ in request.prompts[1:]] + [[]]
        first = answers[: request.num_told]
        likely = self.model.base.log_likelihoods(self.model.adapter, request.prompts[: request.num_told], first)
        told = [Told(ids, each) for ids, each in zip(first, likely, strict=True)]
        return EngineReply(answers, 9, "engine-3", "there", "GPU-4", started_at=1.5, busy_seconds=0.25, told=told)


def test_an_engine_is_asked_as_the_model_would_be_and_has_rows_of_its_own(
    model: LanguageModel, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    engine = OneWord(client)
    client.generation = GenerationConfig(max_new_tokens=4, temperature=0.5)
    clock = SimpleNamespace(perf_counter=lambda: engine.clock)
    monkeypatch.setattr("semcons_ray.modeling.handover.time", clock)
    monkeypatch.setattr("semcons_ray.metering.ledger.perf_counter", clock.perf_counter)
    client.fine_tune(1, NO_LABELS)
    client.ledger.take()
    prompts, tests = ["add one and six", "spell two"], ["add one and two"]
    expected = [
        model.engine_request(client.adapter, prompts, client.generation, stream(0, 2, 1, "generate")),
        model.engine_request(client.adapter, prompts, client.generation, stream(0, 2, 1, "generate")),
        model.engine_request(
            client.adapter,
            tests,
            client.generation.model_copy(update={"temperature": 0.0}),
            stream(0, 2, 1, "evaluate"),
        ),
    ]
    assert Answers.decode(sent := client.answer(2)).answers == ("engine", "")
    # A prompt without an answer gives no label.
    assert client.label_prompts(2) == PseudoLabels(round_number=1, prompt_ids=(0,), responses=("engine",))
    assert client.evaluate(2).answers == ("",)
    assert engine.asked == [replace(asked, num_told=1) for asked in expected]
    rows = client.ledger.take()
    own = [(row.stage, row.round, row.client_id, row.tokens, row.uplink_bytes) for row in rows[1::2]]
    processed = model.negative_log_likelihood(client.adapter, PRIVATE[:2], 32).processed_tokens
    assert own == [("generate", 2, 1, 0, len(sent)), ("generate", 2, 1, 0, 0), ("evaluate", 2, 1, processed, 0)]
    assert [row.duration_seconds for row in rows[1::2]] == [0.0] * 3  # the engine's seconds are not the client's
    assert work(rows[::2], "gpus", "tokens", "started_at") == [
        (stage, 2, 1, "engine-3", "there", "GPU-4", 9, 1.5) for stage in ("generate", "generate", "evaluate")
    ]
    assert [row.duration_seconds for row in rows[::2]] == [0.25] * 3


def test_an_engine_is_asked_for_all_samples_at_once(model: LanguageModel, make_client: MakeClient) -> None:
    client = make_client()
    engine = OneWord(client)
    for count in (1, 2):
        client.generation = GenerationConfig(max_new_tokens=4, num_samples=count)
        sent = Answers.decode(client.answer(2))
        assert sent.samples == (("engine", ""),) if count == 1 else (("engine", "engine"), ("engine", ""))
    one, two = engine.asked
    assert two.prompts == [*one.prompts] * 2
    assert two.seeds[:2] == one.seeds
    assert len(set(two.seeds)) == 4


def test_what_is_exported_is_the_frozen_adapter_and_the_clients_own(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client()
    client.fine_tune(1, NO_LABELS)
    adapted(client).export(tmp_path)
    own = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(own[key.replace(".default", "")], value) for key, value in client.adapter.items())
    client.frozen, client.adapter = client.adapter, client.fresh_adapter(2)
    client.fine_tune(2, NO_LABELS)
    adapted(client).export(tmp_path)
    both = load_file(tmp_path / "adapter_model.safetensors")
    for a in [key for key in client.adapter if "lora_A" in key]:
        b = a.replace("lora_A", "lora_B")
        expected = client.frozen[b] @ client.frozen[a] + client.adapter[b] @ client.adapter[a]
        a, b = (key.replace(".default", "") for key in (a, b))
        torch.testing.assert_close(both[b] @ both[a], expected)


def test_an_upload_is_a_row_of_its_client_and_round(make_client: MakeClient) -> None:
    client = make_client()
    uplink = client.upload(3, {"w": torch.tensor([0.5])}, "float32", "zstd")
    assert work(client.ledger.take(), *COLUMNS) == [("encode", 3, 1, "worker-0", "here", 0, len(uplink), 0)]
