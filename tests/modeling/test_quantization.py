"""Quantised base models. What needs bitsandbytes skips itself where it is missing; the refusals are tested anywhere."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from semcons_ray.commands.cli import main
from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.modeling import quantization
from semcons_ray.modeling.footprint import measure_footprint
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = [
    pytest.mark.bitsandbytes,
    pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed: pip install --no-deps bitsandbytes"),
    # What it and transformers warn of themselves: casts, and their own deprecations.
    pytest.mark.filterwarnings("default"),
]
PAIRS = [Pair("add one and two", "it is 3"), Pair("spell one two", "o n e"), Pair("which is more, one or two?", "two")]
SETTINGS = TrainingConfig(learning_rate=1e-2, batch_size=3, local_epochs=20)


def load(folder: Path | str, bits: str, dtype: str = "float32") -> LanguageModel:
    return LanguageModel(
        str(folder),
        lora=LoraConfig(),
        dtype=dtype,
        device="cpu",
        max_length=64,
        quantization=bits,  # type: ignore[arg-type]
    )


def nll(model: LanguageModel, adapter: dict[str, torch.Tensor], pairs: list[Pair] = PAIRS) -> float:
    score = model.negative_log_likelihood(adapter, pairs, 4)
    return score.nll_sum / sum(score.num_tokens)


def weight_bytes(model: LanguageModel) -> int:
    """Of everything but the adapter: parameters, and the scales of quantised ones."""
    total = 0
    for key, value in model.model.named_parameters():
        if "lora_" in key:
            continue
        total += value.numel() * value.element_size()
        state = getattr(value, "quant_state", None)
        total += state.absmax.numel() * state.absmax.element_size() if state is not None else 0
    return total


class TestWithBitsandbytes:
    pytestmark = needs_bitsandbytes

    @pytest.mark.parametrize(("bits", "dtype"), [("8bit", "float32"), ("4bit", "float32"), ("4bit", "bfloat16")])
    def test_a_quantised_model_learns_in_every_layer_even_after_it_has_answered(
        self, tiny_llama: Path, bits: str, dtype: str
    ) -> None:
        model = load(tiny_llama, bits, dtype)
        plain = load(tiny_llama, "none", dtype)
        fresh, adapter = model.fresh_adapter(), model.fresh_adapter()
        before = nll(model, adapter)
        assert before == pytest.approx(nll(plain, fresh), rel=0.05)
        assert before != nll(plain, fresh)
        model.generate(adapter, ["add one and two"], GenerationConfig(max_new_tokens=4), np.random.default_rng(0))
        model.fine_tune(adapter, PAIRS, SETTINGS, np.random.default_rng(0))
        plain.fine_tune(fresh, PAIRS, SETTINGS, np.random.default_rng(0))
        gained = nll(plain, plain.fresh_adapter()) - nll(plain, fresh)
        assert before - nll(model, adapter) == pytest.approx(gained, rel=0.1)
        assert gained > 0.4
        unmoved = [key for key, value in adapter.items() if "lora_B" in key and not value.any()]
        assert unmoved == []

    @pytest.mark.parametrize("bits", ["8bit", "4bit"])
    def test_a_visit_depends_on_nothing_that_the_model_did_before(self, tiny_llama: Path, bits: str) -> None:
        def visit(model: LanguageModel) -> tuple[float, list[str], dict[str, torch.Tensor]]:
            adapter, rng = model.fresh_adapter(), np.random.default_rng(1)
            loss = model.fine_tune(adapter, PAIRS, SETTINGS, rng).loss
            return (
                loss,
                model.generate(adapter, ["add two and two"], GenerationConfig(max_new_tokens=6), rng)[0],
                adapter,
            )

        used = load(tiny_llama, bits, "bfloat16")
        first, second, third = visit(used), visit(used), visit(load(tiny_llama, bits, "bfloat16"))
        for other in (second, third):
            assert other[:2] == first[:2]
            assert all(torch.equal(value, other[2][key]) for key, value in first[2].items())

    @pytest.mark.parametrize("bits", ["8bit", "4bit"])
    def test_the_footprint_counts_quantised_weights(self, tiny_llama: Path, bits: str) -> None:
        batches = {"max_length": 8, "batch_size": 1, "generation_batch_size": 1, "max_new_tokens": 1}
        planned = measure_footprint(tiny_llama, dtype="bfloat16", quantization=bits, **batches)  # type: ignore[arg-type]
        working = 64 * 32 * 2
        assert planned.weights - working == pytest.approx(weight_bytes(load(tiny_llama, bits, "bfloat16")), rel=0.01)

    @pytest.mark.slow
    @pytest.mark.real
    @pytest.mark.parametrize(("bits", "near"), [("8bit", 0.05), ("4bit", 0.2)])
    def test_smollm2_keeps_its_knowledge_and_learns(self, bits: str, near: float) -> None:
        pairs = [
            Pair("What is the capital of Japan?", "Tokyo"),
            Pair("What is the largest planet of our solar system?", "Jupiter"),
            Pair("How many legs does a spider have?", "Eight"),
            Pair("Which gas do plants take in from the air?", "Carbon dioxide"),
        ]
        folder = resolve_model("packaged:smollm2-135m-instruct")
        plain, model = load(folder, "none", "bfloat16"), load(folder, bits, "bfloat16")
        assert weight_bytes(model) < {"8bit": 0.65, "4bit": 0.5}[bits] * weight_bytes(plain)
        adapter = model.fresh_adapter()
        before = nll(model, adapter, pairs)
        assert before == pytest.approx(nll(plain, adapter, pairs), rel=near)
        model.fine_tune(adapter, pairs, TrainingConfig(local_steps=4), np.random.default_rng(0))
        assert nll(model, adapter, pairs) < 0.7 * before


def test_the_footprint_of_quantised_weights_by_hand(tmp_path: Path) -> None:
    """A matrix of 64 x 32 in 8 or 4 bits, embeddings of 100 x 32 and a norm of 32 in bfloat16."""
    shapes = {
        "model.embed_tokens.weight": [100, 32],
        "lm_head.weight": [100, 32],
        "norm.weight": [32],
        "up.weight": [64, 32],
    }
    header = json.dumps(
        {key: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for key, shape in shapes.items()}
    )
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    batches = {"max_length": 8, "batch_size": 1, "generation_batch_size": 1, "max_new_tokens": 1}
    kept, working = 2 * (2 * 100 * 32 + 32), 2 * 64 * 32
    for bits, matrix in (("8bit", 64 * 32), ("4bit", 64 * 32 // 2 + 64 * 32 // 64 * 4)):
        assert (
            measure_footprint(tmp_path, dtype="bfloat16", quantization=bits, **batches).weights
            == kept + matrix + working
        )
    assert measure_footprint(tmp_path, dtype="bfloat16", **batches).weights == kept + 2 * 64 * 32


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))


@pytest.mark.usefixtures("without")
def test_a_missing_package_is_one_line_with_exit_code_2(
    tmp_path: Path, tiny_llama: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{source: {tiny_data}, examples_per_client: 4, num_test: 4}}\n"
        f"evaluation: {{num_answers: 2}}\nprompts: {{budget: 4, selection: random}}\n"
        f"model: {{name: {tiny_llama}, quantization: 4bit}}\n"
        f"resources: {{fleet: local, device: cpu}}\nserver: {{embedding_model: {tiny_llama}}}\n"
    )
    assert main(["run", str(config), "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("semcons: model.quantization 4bit needs bitsandbytes (pip install")


def test_a_number_of_bits_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model.quantization", "2bit", "--out", str(tmp_path / "out")]) == 2
    assert "model.quantization: Input should be 'none', '8bit' or '4bit'" in capsys.readouterr().err


def pretend(monkeypatch: pytest.MonkeyPatch, devices: set[str] | None) -> None:
    """A bitsandbytes that supports `devices`; None: one that does not start."""
    module = ModuleType("bitsandbytes")
    if devices is not None:
        module.supported_torch_devices = devices  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", module if devices is not None else None)
    monkeypatch.setattr(quantization, "check_quantization", lambda bits: None)


def test_a_package_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(ModelError, match=r"model\.quantization 8bit: bitsandbytes does not start here"):
        load(tiny_llama, "8bit")


def test_a_device_that_it_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    pretend(monkeypatch, {"cuda"})
    with pytest.raises(ModelError, match=r"model\.quantization 4bit: bitsandbytes does not know cpu; set it to none"):
        load(tiny_llama, "4bit")


def test_weights_go_to_a_gpu_one_by_one_and_not_by_way_of_a_whole_model_in_host_memory() -> None:
    assert quantization.loading_options("none", dtype="bfloat16", device="cuda") == {"device_map": {"": "cuda"}}
    assert quantization.loading_options("none", dtype="bfloat16", device="cpu") == {}
