"""How much of a training step and of a generated token is a launch of a kernel, or a wait for a GPU.

Counted on a CPU by what torch is asked to do, which is the same on a GPU but for attention and what is fused there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.modeling.fused import fuse
from semcons_ray.modeling.language_model import LanguageModel, Pair
from tests.tiny import write_model

NO_KERNEL = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand",
             "lift_fresh", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unsqueeze", "view",
             "_record_function_enter_new", "_record_function_exit", "_local_scalar_dense"}  # fmt: skip
PAIRS = [Pair("add one and two", "three four five")] * 8


class Operations(TorchDispatchMode):
    """What torch is asked to do in the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[LanguageModel]:
    """With two layers and with three, so that a layer can be told from the rest."""
    made = []
    for layers in (2, 3):
        folder = write_model(tmp_path_factory.mktemp("models") / str(layers), num_hidden_layers=layers)
        model = LanguageModel(str(folder), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=64)
        fuse(model.model)
        model.ends = []
        made.append(model)
    return made


def one_more(work: Callable[[int], object], times: int = 2) -> Counter[str]:
    """What torch does for one step or token more."""
    few, more = Operations(), Operations()
    with few:
        work(times)
    with more:
        work(times + 1)
    return more.counts - few.counts


def train(model: LanguageModel, **training: object) -> Callable[[int], object]:
    def steps(number: int) -> None:
        settings = TrainingConfig.model_validate({"batch_size": 4, "local_steps": number, **training})
        model.fine_tune(model.fresh_adapter(), PAIRS, settings, np.random.default_rng(0))

    return steps


def answer(model: LanguageModel) -> Callable[[int], object]:
    def tokens(number: int) -> None:
        settings = GenerationConfig(max_new_tokens=number, batch_size=4)
        model.generate(model.fresh_adapter(), [pair.prompt for pair in PAIRS[:4]], settings, np.random.default_rng(0))

    return tokens


def kernels(counts: Counter[str]) -> int:
    return sum(number for name, number in counts.items() if name not in NO_KERNEL)


@pytest.mark.parametrize(
    ("work", "a_layer", "all_else"),
    [(train, 194, 77), (answer, 54, 32)],
)
def test_a_step_and_a_token_launch_no_more_kernels_than_they_did(
    models: list[LanguageModel], work: Callable[[LanguageModel], Callable[[int], object]], a_layer: int, all_else: int
) -> None:
    """Outside the forward and the backward pass, nothing is done to a single one of a layer's 14 tensors."""
    two, three = (kernels(one_more(work(model))) for model in models)
    assert three - two <= a_layer
    assert two - 2 * (three - two) <= all_else


def test_a_step_reads_nothing_but_what_transformers_asks(models: list[LanguageModel]) -> None:
    """Whether a mask masks anything. The optimizer on a CPU reads numbers that are there: two for each tensor."""
    model = models[0]
    counts = one_more(train(model))
    assert counts["_local_scalar_dense"] - 2 * len(model.fresh_adapter()) == 1
    assert one_more(train(model, packing=True))["_local_scalar_dense"] - 2 * len(model.fresh_adapter()) <= 2


def test_ends_are_read_once_in_many_tokens(models: list[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models[0]
    monkeypatch.setattr(model, "_read_every", 8)
    read: list[int] = []
    goes_on = model._goes_on
    monkeypatch.setattr(model, "_goes_on", lambda unfinished: read.append(1) or goes_on(unfinished))
    assert not one_more(answer(model), times=9)["_local_scalar_dense"]
    read.clear()
    answer(model)(20)
    assert len(read) == 3
