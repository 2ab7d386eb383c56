"""An engine that answers with another adapter than it was given is found out, and rounding is no such adapter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from semcons_ray.config import GenerationConfig, LoraConfig
from semcons_ray.errors import EngineError
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.engine import EngineReply, EngineRequest, Told
from semcons_ray.modeling.handover import HandOver, fault
from semcons_ray.modeling.language_model import LanguageModel

PROMPTS = ["add one and six", "spell two", "spell ten"]
GENERATION = GenerationConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return LanguageModel(str(tiny_llama), lora=LoraConfig(rank=4), dtype="float32", device="cpu", max_length=48)


def trained(model: LanguageModel, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return {
        key: torch.from_numpy(draw.standard_normal(value.shape, dtype=np.float32)) if "lora_B" in key else value
        for key, value in model.fresh_adapter().items()
    }


@dataclass
class Serving:
    """An engine that answers, at each call, with the next of these adapters."""

    model: LanguageModel
    adapters: list[Adapter]
    asked: list[EngineRequest] = field(default_factory=list)

    def generate(self, request: EngineRequest) -> EngineReply:
        self.asked.append(request)
        answers = [[5 + place, 6, 7] for place in range(len(request.prompts))]
        first = request.prompts[: request.num_told]
        likely = self.model.log_likelihoods(self.adapters.pop(0), first, answers[: len(first)])
        told = [Told(ids, each) for ids, each in zip(answers, likely, strict=False)]
        return EngineReply(answers, 9, "engine-0", "here", "", started_at=1.0, busy_seconds=0.1, told=told)


Ask = Callable[[Adapter], list[tuple[EngineReply, float]]]


def asking(model: LanguageModel, engine: Serving) -> Ask:
    handover = HandOver(engine, model)
    return lambda adapter: handover.ask(
        adapter, model.engine_request(adapter, PROMPTS, GENERATION, np.random.default_rng(0))
    )


def test_one_that_answers_with_each_adapter_is_asked_once_for_each(model: LanguageModel) -> None:
    first, second = trained(model, 0), trained(model, 1)
    engine = Serving(model, [model.fresh_adapter(), first, second, second, first])
    ask = asking(model, engine)
    for adapter in [*engine.adapters]:
        ((reply, seconds),) = ask(adapter)
        assert len(reply.answers) == 3
        assert seconds >= 0
    assert [request.num_told for request in engine.asked] == [1] * 5


def test_one_that_is_an_adapter_late_is_asked_again_and_then_refused_with_the_setting(model: LanguageModel) -> None:
    first, second = trained(model, 0), trained(model, 1)
    ask = asking(model, Serving(model, [first, first, second, second, second]))
    ask(first)
    assert len(ask(second)) == 2  # late, then right
    with pytest.raises(EngineError, match=r"engine-0 does not answer with the adapter .*generation\.engine to transf"):
        ask(first)


def test_one_that_leaves_the_adapter_out_is_refused(model: LanguageModel) -> None:
    fresh = model.fresh_adapter()
    ask = asking(model, Serving(model, [fresh] * 3))
    assert len(ask(fresh)) == 1  # nothing to tell apart
    with pytest.raises(EngineError, match="nats off"):
        ask(trained(model, 0))


def test_an_answer_without_its_likelihoods_proves_nothing(model: LanguageModel) -> None:
    class Silent(Serving):
        def generate(self, request: EngineRequest) -> EngineReply:
            return EngineReply([[5]] * 3, 3, "engine-0", "here", "", started_at=1.0, busy_seconds=0.1)

    with pytest.raises(EngineError, match="tells of 0 answers of 1"):
        asking(model, Silent(model, []))(trained(model, 0))


def test_likelihoods_of_tokens_add_up_to_what_the_answers_score(model: LanguageModel) -> None:
    adapter, answers = trained(model, 0), [[5, 6, 7], [9]]
    prompts = [[1, 2, 3, 4], [3, 2]]
    together = model.log_likelihoods(adapter, prompts, answers)
    with model.holding(adapter) as held:
        for prompt, answer, found in zip(prompts, answers, together, strict=True):
            logits = held(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            assert found == pytest.approx(logits[places, answer].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("by_engine", "now", "before", "dtype", "says"),
    [
        ([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], "float32", None),
        # In bfloat16, 0.5 nats a token are allowed, and in float32 0.005.
        ([-1.45, -2.0], [-1.0, -2.0], [-1.0, -2.0], "bfloat16", None),
        ([-1.8, -2.0], [-1.0, -2.0], [-1.0, -2.0], "bfloat16", "nats off"),
        ([-1.004, -2.0], [-1.0, -2.0], [-1.0, -2.0], "float32", None),
        ([-1.008, -2.0], [-1.0, -2.0], [-1.0, -2.0], "float32", "nats off"),
        # Further off than that, if the adapter before is twice as far.
        ([-2.0, -2.0], [-1.0, -2.0], [-3.5, -2.0], "bfloat16", None),
        ([-2.0, -2.0], [-1.0, -2.0], [-2.9, -2.0], "bfloat16", "nats off"),
        # Within the rounding of many tokens, but nearer to the adapter before: the distance of the two is 1.2, over 1.
        ([-1.2] * 16, [-1.5] * 16, [-1.2] * 16, "bfloat16", "the adapter before"),
        ([-1.4] * 16, [-1.5] * 16, [-1.2] * 16, "bfloat16", None),
        ([-1.3] * 16, [-1.5] * 16, [-1.3] * 16, "bfloat16", None),  # 0.8 apart: nothing can be told
        ([float("nan")], [-1.0], [-1.0], "bfloat16", "nats off"),
        ([], [-1.0], [-1.0], "bfloat16", "0 tokens of 1"),
    ],
)
def test_what_is_rounding_and_what_is_another_adapter(
    by_engine: list[float], now: list[float], before: list[float], dtype: str, says: str | None
) -> None:
    found = fault(by_engine, now, before, dtype)
    assert found is None if says is None else says in str(found)
