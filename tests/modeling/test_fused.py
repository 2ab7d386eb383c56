"""What a GPU computes in fewer kernels is what transformers and PEFT compute."""

from pathlib import Path

import numpy as np
import pytest
import torch

from semcons_ray.config import LoraConfig
from semcons_ray.modeling.fused import fuse
from semcons_ray.modeling.language_model import LanguageModel
from tests.modeling.test_gradients import PAIRS, gradients, noisy
from tests.tiny import write_model


def load(folder: Path, *, fused: bool, dtype: str = "float32", **lora: object) -> LanguageModel:
    settings = LoraConfig.model_validate({"rank": 4, "alpha": 6.0, **lora})
    model = LanguageModel(str(folder), lora=settings, dtype=dtype, device="cpu", max_length=64)
    if fused:
        fuse(model.model)
    return model


def changed(model: LanguageModel) -> set[str]:
    """Kinds of the modules that compute in another way than their class."""
    return {type(module).__name__ for module in model.model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2"])
def test_losses_and_gradients_are_the_same_but_for_rounding(architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", architecture)
    plain, fused = (load(folder, fused=each) for each in (False, True))
    for checkpointing in (False, True):
        (expected, loss), (found, same) = (
            gradients(model, batch_size=8, gradient_checkpointing=checkpointing) for model in (plain, fused)
        )
        assert same == pytest.approx(loss, rel=1e-5)
        for one, other in zip(found, expected, strict=True):
            for key, value in one.items():
                torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-6)
    scores = [model.negative_log_likelihood(noisy(model), PAIRS, 4).nll for model in (plain, fused)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_only_what_gives_the_same_is_changed(tmp_path: Path) -> None:
    def kinds(name: str, architecture: str, dtype: str = "bfloat16", **lora: object) -> set[str]:
        return changed(load(write_model(tmp_path / name, architecture), fused=True, dtype=dtype, **lora))

    assert kinds("llama", "llama") == {"Linear", "LlamaRMSNorm"}
    assert kinds("gemma", "gemma3") == {"Linear"}  # whose norms add 1 to the weights
    assert kinds("gpt2", "gpt2") == set()  # whose layers are transposed, and whose norms are others
    assert kinds("dora", "llama", use_dora=True) == {"LlamaRMSNorm"}
    assert kinds("half", "llama", "float16") == {"LlamaRMSNorm"}  # an adapter in float32
