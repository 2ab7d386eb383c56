"""Where memory does not suffice, one line says what to lower. tests/gpu has the same on a GPU, and its bits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.modeling.device import enough_memory, repeatable, running_sums
from semcons_ray.modeling.embedding import Embedder
from semcons_ray.modeling.language_model import LanguageModel, Pair
from tests.modeling.test_embedding_kinds import write_bert

PAIRS = [Pair("one", "two")] * 4
WORKS: dict[str, tuple[Callable[[LanguageModel], object], tuple[str, ...]]] = {
    "train": (
        lambda model: model.fine_tune(
            model.fresh_adapter(), PAIRS, TrainingConfig(batch_size=3), np.random.default_rng(0)
        ),
        ("training.batch_size 3", "training.gradient_checkpointing"),
    ),
    "answer": (
        lambda model: model.generate(
            model.fresh_adapter(), ["one"], GenerationConfig(batch_size=2), np.random.default_rng(0)
        ),
        ("generation.batch_size 2", "generation.max_new_tokens"),
    ),
    "score answers": (
        lambda model: model.negative_log_likelihood(model.fresh_adapter(), PAIRS, 2),
        ("generation.batch_size 2",),
    ),
    "score answers, options": (
        lambda model: model.option_nll(model.fresh_adapter(), [("one", ("two", "three"))], 2),
        ("generation.batch_size 2",),
    ),
}


def ask_for_too_much(*_: object) -> None:
    torch.empty(1 << 50)  # bytes that no machine has


@pytest.fixture
def model(tiny_llama: Path) -> LanguageModel:
    return LanguageModel(str(tiny_llama), lora=LoraConfig(rank=2), dtype="float32", device="cpu", max_length=32)


@pytest.mark.parametrize("work", WORKS)
def test_the_settings_to_lower_are_named(work: str, model: LanguageModel) -> None:
    do, settings = WORKS[work]
    handle = model.model.get_base_model().register_forward_pre_hook(ask_for_too_much)
    with pytest.raises(
        ModelError, match=rf"^not enough memory to {work.partition(',')[0]} with model [^\n]*$"
    ) as caught:
        do(model)
    for setting in (*settings, "model.max_length 32", "can't allocate memory"):
        assert setting in str(caught.value)
    handle.remove()
    do(model)  # it is left as it was


def tuned(model: LanguageModel, **settings: object) -> dict[str, torch.Tensor]:
    """The fresh adapter after two epochs of eight examples of several lengths."""
    adapter = model.fresh_adapter(np.random.default_rng(0))
    pairs = [Pair("one " * (1 + i % 3), "two " * (1 + i % 2)) for i in range(8)]
    training = TrainingConfig.model_validate({"learning_rate": 0.1, "local_epochs": 2, **settings})
    model.fine_tune(adapter, pairs, training, np.random.default_rng(1))
    return adapter


@pytest.mark.parametrize(("first", "size"), [(0, 8), (1, 4)], ids=["at once", "in the midst of a step"])
def test_a_batch_that_does_not_fit_is_tried_in_halves(first: int, size: int, model: LanguageModel) -> None:
    expected = tuned(model, batch_size=2, gradient_accumulation_steps=4)
    seen: list[int] = []

    def only_two(_: object, __: object, inputs: dict[str, torch.Tensor]) -> None:
        seen.append(len(inputs["input_ids"]))
        if seen[-1] > 2 and len(seen) > first:
            ask_for_too_much()

    handle = model.model.get_base_model().register_forward_pre_hook(only_two, with_kwargs=True)
    settings = {"batch_size": size, "gradient_accumulation_steps": 8 // size}
    with pytest.raises(ModelError, match="auto_find_batch_size"):
        tuned(model, **settings)
    seen.clear()
    found = tuned(model, **settings, auto_find_batch_size=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    tried = [8, 4] if size == 8 else [4, 4]
    assert seen == [*tried, *[2] * 8]
    seen.clear()
    tuned(model, **settings, auto_find_batch_size=True)
    assert seen == [2] * 8  # what did not fit is not tried again
    handle.remove()


def test_one_row_that_does_not_fit_is_said(model: LanguageModel) -> None:
    model.model.get_base_model().register_forward_pre_hook(ask_for_too_much)
    with pytest.raises(ModelError, match=r"not enough memory to train .*model\.max_length 32"):
        tuned(model, batch_size=4, auto_find_batch_size=True)


class TooLarge(dict[str, torch.Tensor]):
    """An adapter, or a frozen one beside it, for which a GPU has no room."""

    def __getitem__(self, key: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")


@pytest.mark.parametrize("frozen", [False, True], ids=["adapter", "frozen"])
@pytest.mark.parametrize("work", ["train", "answer", "score answers"])
def test_adapters_that_find_no_room_are_said_likewise(work: str, frozen: bool, model: LanguageModel) -> None:
    fresh = model.fresh_adapter()
    large = TooLarge(fresh)
    adapter, beside = (fresh, large) if frozen else (large, None)
    works: dict[str, Callable[[], object]] = {
        "train": lambda: model.fine_tune(adapter, PAIRS, TrainingConfig(), np.random.default_rng(0), frozen=beside),
        "answer": lambda: model.generate(
            adapter, ["one"], GenerationConfig(), np.random.default_rng(0), frozen=beside
        ),
        "score answers": lambda: model.negative_log_likelihood(adapter, PAIRS, 2, frozen=beside),
    }
    with pytest.raises(ModelError, match=rf"^not enough memory to {work} .*batch_size .*model\.max_length 32: .*CUDA"):
        works[work]()


def test_the_server_names_its_batch_size(tmp_path: Path) -> None:
    embedder = Embedder(write_bert(tmp_path, positions=64), batch_size=5)
    embedder.model.register_forward_pre_hook(ask_for_too_much)
    with pytest.raises(ModelError, match=r"^not enough memory to embed 5 texts .*server\.embedding_batch_size"):
        embedder.embed(["one"])


def test_a_gpus_own_error_is_cut_to_what_concerns_the_user() -> None:
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79.18 GiB of which 1.20 GiB is free. If reserved"
    with (
        pytest.raises(ModelError, match=r"of which 1\.20 GiB is free\)$"),
        enough_memory("do it", "lower that"),
    ):
        raise torch.OutOfMemoryError(said)


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("do it", "lower that"):
        raise RuntimeError("shapes do not fit")


def test_on_the_cpu_torch_is_left_as_it_is() -> None:
    with repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    rows = torch.rand(1, 10)
    assert torch.equal(running_sums(rows), rows.cumsum(dim=1))


def test_the_mode_of_a_gpu_ends_with_the_block_however_it_ends() -> None:
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    with pytest.raises(KeyError), repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch._C._get_deterministic_fill_uninitialized_memory() == filled
    with repeatable(torch.device("cuda"), wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_model_that_cannot_repeat_its_bits_is_trained_and_a_warning_says_so(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        if model._repeats:  # as torch does on a GPU
            raise RuntimeError("scan_cuda does not have a deterministic implementation, but you set ...")

    model.model.get_base_model().register_forward_pre_hook(refuse)
    model._rehearse_training(PAIRS, TrainingConfig(local_steps=1))
    assert "will not train to the same bits again on a GPU: scan_cuda does not have" in caplog.text
    assert not model._repeats
