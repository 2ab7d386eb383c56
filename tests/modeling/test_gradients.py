"""Gradients are the same however a step is divided into batches, and whatever is kept for the backward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from semcons_ray.config import LoraConfig, TrainingConfig
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.language_model import LanguageModel, Pair, Parameters
from tests.tiny import examples, write_model

# 21 of many lengths: in steps of eight the last has five.
PAIRS = [Pair(row["prompt"], row["response"], weight=0.5 + i % 3) for i, row in enumerate(examples()[:420:20])]
Gradients = list[dict[str, Tensor]]


def load(folder: Path, *, max_length: int = 64, **lora: object) -> LanguageModel:
    settings = LoraConfig.model_validate({"rank": 4, **lora})
    return LanguageModel(str(folder), lora=settings, dtype="float32", device="cpu", max_length=max_length)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


def noisy(model: LanguageModel) -> Adapter:
    """An adapter of random numbers, so that all gradients are far from 0."""
    random = np.random.default_rng(5)
    shapes = {key: value.shape for key, value in model.fresh_adapter().items()}
    return {
        key: torch.from_numpy(0.2 * random.standard_normal(shape, dtype=np.float32)) for key, shape in shapes.items()
    }


def gradients(model: LanguageModel, *, frozen: Adapter | None = None, **training: object) -> tuple[Gradients, float]:
    """What each step's gradients are before they are clipped, and the loss; the adapter hardly moves."""
    steps: Gradients = []

    def keep(parameters: Parameters) -> None:
        steps.append({key: value.grad.clone() for key, value in parameters.items() if value.grad is not None})

    settings = TrainingConfig.model_validate({"learning_rate": 1e-10, **training})
    tuned = model.fine_tune(noisy(model), PAIRS, settings, np.random.default_rng(1), frozen=frozen, adjust=keep)
    return steps, tuned.loss


def assert_same(found: tuple[Gradients, float], expected: tuple[Gradients, float]) -> None:
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert len(found[0]) == len(expected[0])
    for mine, other in zip(found[0], expected[0], strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            assert other[key].abs().max() > 0
            torch.testing.assert_close(mine[key], other[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_gradients_are_those_of_one_batch(model: LanguageModel, batch_size: int, accumulation: int) -> None:
    whole = gradients(model, batch_size=8)
    assert len(whole[0]) == 3
    assert_same(gradients(model, batch_size=batch_size, gradient_accumulation_steps=accumulation), whole)


def test_a_step_has_the_same_examples_in_however_many_batches(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = model.model.forward

    def spy(**inputs: Tensor) -> object:
        rows.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", spy)
    gradients(model, batch_size=3, gradient_accumulation_steps=2)
    assert sorted(rows) == [3] * 7
    rows.clear()
    gradients(model, batch_size=2, gradient_accumulation_steps=4, local_steps=3)
    assert sorted(rows) == [1, *[2] * 10]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_those_without(architecture: str, dropout: float, tmp_path: Path) -> None:
    model = load(write_model(tmp_path, architecture), dropout=dropout)
    with_it = gradients(model, gradient_checkpointing=True)
    assert_same(with_it, gradients(model))
    assert_same(gradients(model, gradient_checkpointing=True), with_it)


def test_checkpointing_and_accumulation_go_together_with_a_frozen_adapter(model: LanguageModel) -> None:
    frozen = {key: -value for key, value in noisy(model).items()}
    together = gradients(model, frozen=frozen, batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True)
    assert_same(together, gradients(model, frozen=frozen, batch_size=8))


def test_layers_are_computed_again_only_while_a_client_that_wants_it_trains(model: LanguageModel) -> None:
    calls: list[int] = []
    attention = model.model.get_base_model().model.layers[0].self_attn
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for checkpointing in (False, True, False):
        calls.clear()
        gradients(model, batch_size=8, local_steps=1, gradient_checkpointing=checkpointing)
        counts.append(len(calls))
    handle.remove()
    assert counts == [1, 2, 1]
    assert not model.model.get_input_embeddings()._forward_hooks
