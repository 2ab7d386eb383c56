"""Gradients are the same however a step is divided into batches and rows, and whatever is kept for the backward
pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from semcons_ray.config import Attention, LoraConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.language_model import (
    Batch,
    LanguageModel,
    Pair,
    Parameters,
)
from semcons_ray.modeling.optimizer import GROWTH_STEPS, LossScale
from semcons_ray.modeling.steps import Segment, pack
from tests.tiny import examples, write_model

# 21 of many lengths: in steps of eight the last has five.
PAIRS = [Pair(row["prompt"], row["response"], weight=0.5 + i % 3) for i, row in enumerate(examples()[:420:20])]
Gradients = list[dict[str, Tensor]]


def load(
    folder: Path,
    *,
    attention: Attention | None = None,
    trainings: Sequence[TrainingConfig] = (TrainingConfig(),),
    dtype: str = "float32",
    **lora: object,
) -> LanguageModel:
    return LanguageModel(
        str(folder),
        lora=LoraConfig.model_validate({"rank": 4, **lora}),
        dtype=dtype,
        device="cpu",
        max_length=64,
        attn_implementation=attention,
        trainings=trainings,
    )


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


def tokens_of(model: LanguageModel) -> list[int]:
    return [len(model.chat.encode(pair.prompt, pair.response).ids) for pair in PAIRS]


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


# 64 tokens a row; sliding windows of 7 tokens are shorter than any text.
PACKED: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, eager": ("llama", {}),
    "gemma3": ("gemma3", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3, eager": ("gemma3", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_batches(name: str, tmp_path: Path) -> None:
    architecture, config = PACKED[name]
    model = load(write_model(tmp_path, architecture, **config), attention="eager" if "eager" in name else None)
    padded = gradients(model, batch_size=len(PAIRS))
    assert len(padded[0]) == 1
    assert_same(gradients(model, batch_size=len(PAIRS), packing=True), padded)
    divided = {"batch_size": 2, "gradient_accumulation_steps": len(PAIRS), "gradient_checkpointing": True}
    assert_same(gradients(model, packing=True, **divided), padded)


def test_packing_is_seen_by_the_model_in_fewer_fuller_rows(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    forward = model.model.forward

    def spy(**inputs: Tensor) -> object:
        shapes.append(inputs["input_ids"].shape)
        assert "attention_mask" not in inputs
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", spy)
    steps, _ = gradients(model, batch_size=2, packing=True, local_epochs=2)
    tokens = sum(tokens_of(model))
    rows = sum(rows for rows, _ in shapes) // 2
    assert all(length <= 64 for _, length in shapes)
    assert tokens / 64 <= rows <= 1.2 * tokens / 64 + 1
    assert len(steps) == len(shapes) == 2 * -(-rows // 2)  # a step has two rows, and the last of an epoch what is left


def test_packed_rows_are_drawn_by_the_generator_alone(model: LanguageModel) -> None:
    lengths = tokens_of(model)
    first, again, other = (pack(lengths, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(0, 5))
def test_every_example_is_in_one_row_and_no_two_rows_would_fit_in_one(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 64, np.random.default_rng(seed))
    assert sorted(i for row in rows for i in row) == [*range(len(lengths))]
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert not loads or loads[-1] <= 64
    assert len(loads) < 2 or loads[0] + loads[1] > 64


def test_flash_attention_gets_all_texts_of_a_batch_in_one_row(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers finds the texts of a row by their positions only where there is one row."""
    padded = gradients(model, batch_size=len(PAIRS))
    collate, config = model._collate, model.model.config

    def in_one_row(rows: Sequence[Sequence[Segment]], **how: bool) -> Batch:
        with monkeypatch.context() as patched:
            patched.setattr(config, "_attn_implementation_internal", "flash_attention_2")
            batch = collate(rows, **how)
        assert all(len(tensor) == 1 for tensor in batch.inputs.values())
        return batch

    monkeypatch.setattr(model, "_collate", in_one_row)
    assert_same(gradients(model, batch_size=len(PAIRS), packing=True), padded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_tried_at_loading_and_refused_if_packed_texts_see_each_other(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, "llama", initializer_range=0.3)
    packed = [TrainingConfig(), TrainingConfig(packing=True)]
    load(folder, dtype=dtype, trainings=packed)
    # As in a family whose own code makes its masks without a look at positions.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    load(folder, dtype=dtype)
    with pytest.raises(ModelError, match=r"^training\.packing does not fit [^\n]*: what is before a text in its row"):
        load(folder, dtype=dtype, trainings=packed)


def faint(folder: Path, factor: float) -> Path:
    """A model whose output embedding is `factor` times what it was, so that its gradients are small, or large."""
    file = write_model(folder, "llama") / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": factor * weights["lm_head.weight"]}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("factor", [2.0**-8, 1.0, 2.0**10])
def test_gradients_in_float16_are_those_in_float32(factor: float, tmp_path: Path) -> None:
    folder = faint(tmp_path, factor)
    exact, half = (gradients(load(folder, dtype=dtype), batch_size=len(PAIRS)) for dtype in ("float32", "float16"))
    assert half[1] == pytest.approx(exact[1], rel=1e-2)
    for key, gradient in exact[0][0].items():
        assert (half[0][0][key] - gradient).norm() < 0.05 * gradient.norm(), key


def test_a_scale_that_overflows_is_halved_and_its_step_taken_with_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(faint(tmp_path, 2.0**10), dtype="float16")
    scales: list[float] = []
    accumulate = LanguageModel._accumulate

    def spy(self: LanguageModel, learners: Any, *more: Any) -> list[Tensor]:
        scales.append(learners[0].scale.factor)
        return accumulate(self, learners, *more)

    monkeypatch.setattr(LanguageModel, "_accumulate", spy)
    steps, _ = gradients(model, batch_size=8)
    assert len(steps) == 3
    assert scales[:3] == [2.0**16, 2.0**15, 2.0**14]
    assert scales[-1] < 2.0**16  # what was learnt of the scale is kept for the next step
    again = len(scales)
    gradients(model, batch_size=8)
    assert scales[again:] == scales[:again]  # and not for the next call


def test_a_scale_grows_after_many_steps_and_ends_at_one() -> None:
    scale = LossScale(4.0)
    assert [scale.keeps(True) for _ in range(GROWTH_STEPS)] == [True] * GROWTH_STEPS
    assert scale == LossScale(8.0)
    assert [scale.keeps(False) for _ in range(4)] == [False, False, False, True]
    assert scale.factor == 1.0


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
