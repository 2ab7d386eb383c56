"""vLLM itself, on the CPU: adapters apart from each other, the same answers as transformers, and what it refuses."""

import importlib.util
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from semcons_ray.config import GenerationConfig, LoraConfig
from semcons_ray.errors import ConfigError, EngineError, ModelError
from semcons_ray.modeling import vllm_engine
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.engine import EngineReply, EngineRequest
from semcons_ray.modeling.handover import HandOver
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.modeling.vllm_engine import EngineSpec, VllmEngine

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
    # vLLM's own, at import and at start
    pytest.mark.filterwarnings("ignore"),
]

PROMPTS = [f"add {left} and {right}" for left in ("one", "two", "three", "nine") for right in ("four", "seven", "ten")]
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=12)


def trained(model: LanguageModel, seed: int, size: float) -> Adapter:
    """An adapter as training could leave it: B is no longer zero."""
    adapter, draw = model.fresh_adapter(), np.random.default_rng(seed)
    for key in [key for key in adapter if "lora_B" in key]:
        adapter[key] = torch.from_numpy(size * draw.standard_normal(adapter[key].shape, dtype=np.float32))
    return adapter


def ask_all(engine: VllmEngine, requests: list[EngineRequest]) -> list[EngineReply]:
    """All at once, a thread each."""
    replies: dict[int, EngineReply] = {}

    def ask(index: int) -> None:
        replies[index] = engine.generate(requests[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [replies[index] for index in range(len(requests))]


def test_without_vllm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"generation\.engine is vllm, but vLLM is not installed: `make vllm`"):
        EngineSpec("engine-0", "nothing", "float32", 1, 0.0, 64, 8, 1, 1 << 28).build("")


def test_room_is_the_least_that_holds_the_rank() -> None:
    assert [vllm_engine.room_for_rank(rank) for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(ConfigError, match=r"model\.lora\.rank is 513"):
        vllm_engine.room_for_rank(513)


class TestTiny:
    pytestmark = needs_vllm

    @pytest.fixture(scope="class")
    def model(self, wide_llama: Path) -> LanguageModel:
        return LanguageModel(str(wide_llama), lora=LoraConfig(rank=4), dtype="float32", device="cpu", max_length=64)

    @pytest.fixture(scope="class")
    def spec(self, wide_llama: Path) -> EngineSpec:
        return EngineSpec("engine-0", str(wide_llama), "float32", 1, 0.0, 76, 4, 2, 1 << 26)

    @pytest.fixture(scope="class")
    def engine(self, spec: EngineSpec) -> Iterator[VllmEngine]:
        engine = spec.build("")
        yield engine
        engine.close()

    def test_two_adapters_in_one_batch_each_give_their_own_answers(
        self, engine: VllmEngine, model: LanguageModel
    ) -> None:
        adapters = [trained(model, seed, 0.5) for seed in range(2)]
        draw = np.random.default_rng(0)
        replies = ask_all(engine, [model.engine_request(adapter, PROMPTS, GREEDY, draw) for adapter in adapters])
        for adapter, reply in zip(adapters, replies, strict=True):
            assert model.decode(reply.answers) == model.generate(adapter, PROMPTS, GREEDY, draw)[0]
        assert replies[0].answers != replies[1].answers

    def test_more_clients_than_room_for_adapters_are_all_answered(
        self, engine: VllmEngine, model: LanguageModel
    ) -> None:
        adapters = [trained(model, seed, 0.5) for seed in range(4)]
        draw = np.random.default_rng(0)
        for start in (0, 2):
            requests = [model.engine_request(a, PROMPTS, GREEDY, draw) for a in adapters[start : start + 2]]
            for adapter, reply in zip(adapters[start:], ask_all(engine, requests), strict=False):
                assert model.decode(reply.answers) == model.generate(adapter, PROMPTS, GREEDY, draw)[0]
        assert not engine._engine.list_loras()

    def test_sampled_answers_repeat_with_the_stream_and_change_with_it(
        self, engine: VllmEngine, model: LanguageModel
    ) -> None:
        adapter, sampled = trained(model, 0, 0.5), GREEDY.model_copy(update={"temperature": 1.0})
        several = sampled.model_copy(update={"num_samples": 2})
        requests = [model.engine_request(adapter, PROMPTS, sampled, np.random.default_rng(s)) for s in (1, 1, 2)]
        first, again, other = (engine.generate(request).answers for request in requests)
        assert first == again != other
        twice = model.engine_request(adapter, PROMPTS, several, np.random.default_rng(1))
        samples = engine.generate(twice).answers
        assert samples[: len(PROMPTS)] == first != samples[len(PROMPTS) :]
        in_company = ask_all(engine, [requests[0], requests[2]])[0].answers
        assert in_company == first  # float32 on a tiny model: no draw is near enough to a boundary

    def test_ends_are_counted_and_cut_off(self, engine: VllmEngine, model: LanguageModel) -> None:
        request = model.engine_request(model.fresh_adapter(), PROMPTS, GREEDY, np.random.default_rng(0))
        plain = engine.generate(request)
        ending = plain.answers[0][2]
        cut = engine.generate(replace(request, ends=[ending]))
        assert cut.answers[0] == plain.answers[0][: plain.answers[0].index(ending)]
        assert cut.num_tokens > sum(map(len, cut.answers))

    def test_likelihoods_of_the_first_answers_are_those_of_transformers(
        self, engine: VllmEngine, model: LanguageModel
    ) -> None:
        adapter = trained(model, 0, 0.5)
        sampled = GREEDY.model_copy(update={"temperature": 0.7, "top_k": 20})
        request = model.engine_request(adapter, PROMPTS, sampled, np.random.default_rng(0))
        plain = engine.generate(request)
        ending = plain.answers[1][2]
        reply = engine.generate(replace(request, num_told=2, ends=[ending]))
        assert plain.told == []
        assert reply.answers[0] == plain.answers[0][: len(reply.answers[0])]  # asked or not, the same is drawn
        assert [told.ids for told in reply.told][1] == [*reply.answers[1], ending]
        again = model.log_likelihoods(adapter, request.prompts[:2], [told.ids for told in reply.told])
        for told, likely in zip(reply.told, again, strict=True):
            assert told.log_likelihoods == pytest.approx(likely, abs=1e-4)

    def test_an_adapter_is_proven_to_be_in_use_and_one_that_came_late_is_found_out(
        self, engine: VllmEngine, model: LanguageModel
    ) -> None:
        class Late:
            """The same engine, which is given the adapter of the request before, as often as `late` says."""

            late = 0
            before: Mapping[str, bytes]

            def generate(self, request: EngineRequest) -> EngineReply:
                given = request if not self.late else replace(request, adapter=self.before)
                self.late, self.before = max(0, self.late - 1), given.adapter
                return engine.generate(given)

        late = Late()
        handover = HandOver(late, model)
        adapters = [model.fresh_adapter(), *(trained(model, seed, 0.5) for seed in range(3))]
        requests = [model.engine_request(each, PROMPTS, GREEDY, np.random.default_rng(0)) for each in adapters]
        for adapter, request in zip(adapters, requests, strict=True):
            ((reply, _),) = handover.ask(adapter, request)
            assert model.decode(reply.answers) == model.generate(adapter, PROMPTS, GREEDY, np.random.default_rng(0))[0]
        late.late = 1
        assert len(handover.ask(adapters[1], requests[1])) == 2
        late.late = 2
        with pytest.raises(EngineError, match=r"engine-0 does not answer with the adapter .*generation\.engine"):
            handover.ask(adapters[2], requests[2])

    def test_busy_time_is_divided_among_requests(self, engine: VllmEngine, model: LanguageModel) -> None:
        request = model.engine_request(model.fresh_adapter(), PROMPTS, GREEDY, np.random.default_rng(0))
        one, other = sorted(ask_all(engine, [request, request]), key=lambda reply: reply.started_at)
        assert one.busy_seconds > 0
        assert other.started_at >= one.started_at + one.busy_seconds - 1e-6

    def test_an_adapter_that_does_not_fit_fails_alone(self, engine: VllmEngine, model: LanguageModel) -> None:
        request = model.engine_request(model.fresh_adapter(), PROMPTS, GREEDY, np.random.default_rng(0))
        broken = replace(request, adapter={**request.adapter, "adapter_model.safetensors": b"nothing"})
        with pytest.raises(EngineError, match="engine-0"):
            engine.generate(broken)
        assert not engine.is_broken
        assert engine.generate(request).num_tokens > 0

    def test_a_model_without_kernels_here_is_refused_with_the_reason(self, spec: EngineSpec, tiny_llama: Path) -> None:
        with pytest.raises(ModelError, match="head_dim=8"):
            replace(spec, model=str(tiny_llama)).build("")


@pytest.mark.real
class TestReal:
    pytestmark = needs_vllm

    def test_greedy_answers_are_those_of_transformers_but_for_ties(self) -> None:
        """No token is further below the best, by transformers' logits, than their rounding.

        In bfloat16 logits from 16 to 32 are steps of 0.125; the two compared may each be off by one.
        """
        name = "packaged:smollm2-135m-instruct"
        model = LanguageModel(
            str(resolve_model(name)), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=96
        )
        engine = EngineSpec("engine-0", name, "bfloat16", 1, 0.0, 120, 8, 3, 1 << 28).build("")
        adapters = [trained(model, seed, 0.06) for seed in range(3)]
        draw = np.random.default_rng(0)
        requests = [model.engine_request(adapter, PROMPTS, GREEDY, draw) for adapter in adapters]
        replies = ask_all(engine, requests)
        engine.close()
        assert len({str(reply.answers) for reply in replies}) == 3
        same = 0
        for adapter, request, reply in zip(adapters, requests, replies, strict=True):
            texts = model.generate(adapter, PROMPTS, GREEDY, draw)[0]
            for prompt, ids, text in zip(request.prompts, reply.answers, texts, strict=True):
                same += model.decode([ids])[0] == text
                assert tie_gap(model, adapter, list(prompt), ids) < 0.26, (model.decode([ids]), text)
        assert same >= 0.6 * 3 * len(PROMPTS)
        of_another = zip(requests[0].prompts, replies[1].answers, strict=True)
        assert max(tie_gap(model, adapters[0], list(prompt), ids) for prompt, ids in of_another) > 0.5


@torch.no_grad()
def tie_gap(model: LanguageModel, adapter: Adapter, prompt: list[int], answer: list[int]) -> float:
    """How far below the best token, in nats, any token of a greedy answer is by transformers' own logits."""
    model.load_adapter(adapter)
    ids = torch.tensor([prompt + answer])
    model._scored = lambda hidden: hidden.flatten(0, 1)
    logits = model.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    steps = logits[len(prompt) - 1 : -1]
    return float((steps.max(-1).values - steps[range(len(answer)), answer]).max()) if answer else 0.0
