"""What of a worker's memory is the host's and what a GPU's; what was kept for the backward pass is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from semcons_ray.config import LoraConfig
from semcons_ray.modeling.footprint import (
    CUDA_DEVICE_BYTES,
    CUDA_GROWTH,
    CUDA_HOST_BYTES,
    PROCESS_BYTES,
    Footprint,
    measure_footprint,
)
from semcons_ray.modeling.lora import attach_adapter
from tests.experiments.scripts import load_script
from tests.tiny import write_llama_8b

LiveBytes = load_script("benchmarks/training", "live_bytes.py").LiveBytes

GIB = 1 << 30


def footprint(folder: Path, device: str, *, batch_size: int = 4, max_length: int = 2048, **more: Any) -> Footprint:
    return measure_footprint(
        folder, dtype="bfloat16", max_length=max_length, batch_size=batch_size, generation_batch_size=32,
        max_new_tokens=24, device=device, **more,
    )  # fmt: skip


def test_what_lies_on_a_gpu_is_not_asked_of_the_host(tmp_path: Path) -> None:
    """By hand: 8.03e9 weights of 2 bytes; four matrices of a vocabulary or a feed-forward width are on their way."""
    found = footprint(write_llama_8b(tmp_path), "cuda")
    assert found.weights == 2 * 8_030_261_248
    alive = int(CUDA_GROWTH * (found.activations + found.logits))
    assert found.device_bytes == found.weights + alive + CUDA_DEVICE_BYTES + 24 * found.trained
    loading = 2 * (2 * 128256 * 4096 + 2 * 14336 * 4096)
    assert found.host_bytes == PROCESS_BYTES + CUDA_HOST_BYTES + 10 * 9_085_657 + loading + 32 * found.trained
    assert found.host_bytes < 5 * GIB


def test_on_a_gpu_the_mask_is_kept_and_no_weights_of_attention(tmp_path: Path) -> None:
    """4 x 2048 tokens in 32 layers of Llama: 6 of the width, 4 of the heads' width, 4 of the feed-forward width, T."""
    found = footprint(write_llama_8b(tmp_path), "cuda")
    assert found.activations == 4 * 2048 * 32 * 2 * (6 * 4096 + 4 * 4096 + 4 * 14336 + 2048)


def test_a_worker_on_the_cpu_has_all_of_it_in_host_memory(tmp_path: Path) -> None:
    found = footprint(write_llama_8b(tmp_path), "cpu")
    assert found.device_bytes == 0
    kept = 4 * 2048 * 32 * (2 * (6 * 4096 + 7 * 4096 + 4 * 14336) + 32 * 2048 * 4)
    assert found.activations == kept
    adapter = 56 * found.trained
    assert found.host_bytes == found.weights + 2 * kept + found.logits + found.tokenizer + PROCESS_BYTES + adapter


def test_an_adapter_is_counted_with_its_optimizer(tmp_path: Path) -> None:
    """By hand: of q, k, v, o, gate, up and down, the sum of inputs and outputs, for each unit of the rank."""
    inputs_and_outputs = 4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    folder = write_llama_8b(tmp_path)
    for rank in (8, 64):
        assert footprint(folder, "cuda", lora=LoraConfig(rank=rank)).trained == 32 * rank * inputs_and_outputs
    few = footprint(folder, "cuda", lora=LoraConfig(target_modules=("q_proj", "v_proj")))
    assert few.trained == 32 * 8 * (4096 + 4096 + 4096 + 1024)


def test_parts_add_up_to_the_memory_with_which_a_worker_computes(tmp_path: Path) -> None:
    folder = write_llama_8b(tmp_path)
    on_gpu, on_cpu = footprint(folder, "cuda"), footprint(folder, "cpu")
    assert sum(on_gpu.parts.values()) == on_gpu.device_bytes
    assert sum(on_cpu.parts.values()) + 32 * on_cpu.trained == on_cpu.host_bytes
    assert on_gpu.parts["activations"] == on_gpu.activations > on_gpu.cache
    answers = footprint(folder, "cuda", batch_size=1, gradient_checkpointing=True)
    assert answers.parts["key-value cache"] == answers.cache > answers.activations


def test_with_several_samples_what_was_read_is_kept_once_more(tmp_path: Path) -> None:
    folder = write_llama_8b(tmp_path)
    once, twice, often = (
        measure_footprint(
            folder, dtype="bfloat16", max_length=2048, batch_size=1, generation_batch_size=512, max_new_tokens=24,
            num_samples=count,
        ).cache
        for count in (1, 2, 8)
    )  # fmt: skip
    token = 32 * 2 * 8 * 128 * 2  # layers, keys and values, heads, their width, bytes
    assert once == 512 * (2048 + 24) * token
    assert twice == often == once + 512 * 2048 * token


def test_modules_that_are_trained_whole_are_counted_with_all_that_goes_with_them(tmp_path: Path) -> None:
    folder = write_llama_8b(tmp_path)
    embedding = 128256 * 4096
    for device, on_device, on_host in (("cuda", 24, 32), ("cpu", 0, 56)):
        plain = footprint(folder, device)
        whole = footprint(folder, device, lora=LoraConfig(modules_to_save=("lm_head", "input_layernorm")))
        extra = embedding + 32 * 4096
        assert whole.device_bytes - plain.device_bytes == on_device * extra
        assert whole.host_bytes - plain.host_bytes == on_host * extra


def test_a_rank_has_its_part_of_the_weights_where_the_setting_says(tmp_path: Path) -> None:
    whole = footprint(write_llama_8b(tmp_path), "cuda")
    largest = 2 * 128256 * 4096
    kept, offloaded = whole.divided(4), whole.divided(4, offloaded=True)
    assert whole.device_bytes - kept.device_bytes == whole.weights - (whole.weights // 4 + largest)
    assert kept.host_bytes == whole.host_bytes
    assert whole.device_bytes - offloaded.device_bytes == whole.weights - largest
    assert offloaded.host_bytes == whole.host_bytes + whole.weights // 4


def test_on_the_cpu_offloading_changes_nothing(tmp_path: Path) -> None:
    whole = footprint(write_llama_8b(tmp_path), "cpu")
    assert whole.divided(4, offloaded=True) == whole.divided(4)


SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "vocab_size": 100}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config),
    "granite": (GraniteForCausalLM, GraniteConfig),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
}


def built(name: str, layers: int) -> PreTrainedModel:
    model, config = MODELS[name]
    settings = {key: value for key, value in SHAPE.items() if name != "granite" or key != "head_dim"}
    return model(config(**settings, num_hidden_layers=layers, pad_token_id=0)).to(torch.bfloat16)


def bytes_kept(model: PreTrainedModel, length: int, kernel: SDPBackend, *, use_dora: bool = False) -> int:
    """What two sequences, one of them padded, keep for the backward pass."""
    adapted = attach_adapter(model, LoraConfig(rank=1, use_dora=use_dora), "model").train()
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*adapted.parameters(), *adapted.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros((2, length), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(kernel):
        adapted(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_with_eager_attention_keeps_on_a_gpu_is_bounded(name: str, tmp_path: Path) -> None:
    def eager(layers: int) -> PreTrainedModel:
        model = built(name, layers)
        model.set_attn_implementation("eager")
        return model

    eager(1).save_pretrained(tmp_path)
    planned = measure_footprint(
        tmp_path, dtype="bfloat16", max_length=320, batch_size=2, generation_batch_size=1, max_new_tokens=1,
        attn_implementation="eager", device="cuda",
    ).activations  # fmt: skip
    kernel = SDPBackend.MATH  # not used
    measured = bytes_kept(eager(3), 320, kernel) - bytes_kept(eager(2), 320, kernel)
    assert measured <= planned <= 1.5 * measured


@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_with_dora_keeps_is_bounded(name: str, tmp_path: Path) -> None:
    built(name, 1).save_pretrained(tmp_path)
    planned = measure_footprint(
        tmp_path, dtype="bfloat16", max_length=320, batch_size=2, generation_batch_size=1, max_new_tokens=1,
        lora=LoraConfig(use_dora=True),
    ).activations  # fmt: skip
    few, more = (bytes_kept(built(name, layers), 320, SDPBackend.MATH, use_dora=True) for layers in (2, 3))
    measured = more - few
    assert measured <= planned <= 1.5 * measured


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_keeps_is_as_it_was_counted(name: str, length: int, device: str, tmp_path: Path) -> None:
    """Of a layer that is one more, so without embeddings and logits."""
    model = built(name, 1)
    model.save_pretrained(tmp_path)
    planned = measure_footprint(
        tmp_path, dtype="bfloat16", max_length=length, batch_size=2, generation_batch_size=1, max_new_tokens=1,
        device=device,
    ).activations  # fmt: skip
    kernel = SDPBackend.MATH if device == "cpu" else SDPBackend.FLASH_ATTENTION  # such as GPUs have
    measured = bytes_kept(built(name, 3), length, kernel) - bytes_kept(built(name, 2), length, kernel)
    assert planned == pytest.approx(measured, rel=0.01)


def test_checkpointing_keeps_what_goes_into_layers_and_one_layer_at_work(tmp_path: Path) -> None:
    """16 x 2048 tokens in 32 layers of Llama, and what a layer keeps one and a half times."""
    folder = write_llama_8b(tmp_path)
    layer = footprint(folder, "cuda", batch_size=16).activations // 32
    checkpointed = footprint(folder, "cuda", batch_size=16, gradient_checkpointing=True)
    assert checkpointed.activations == 16 * 2048 * 32 * 2 * 4096 + 3 * layer // 2


def test_with_checkpointing_a_gpu_computes_layers_again_where_the_logits_were(tmp_path: Path) -> None:
    """One layer at work is larger than the logits of 8 x 2048 tokens, half of them scored, and smaller than of more."""
    folder = write_llama_8b(tmp_path)
    for batch_size in (1, 16):
        plain, again = (
            footprint(folder, "cuda", batch_size=batch_size, gradient_checkpointing=each) for each in (False, True)
        )
        layer = 3 * plain.activations // 32 // 2
        assert plain.logits - again.logits == min(layer, 2 * 128256 * batch_size * 1024)
        on_cpu = [footprint(folder, "cpu", gradient_checkpointing=each).logits for each in (False, True)]
        assert on_cpu[0] == on_cpu[1]


def peak_of_training(model: PreTrainedModel, length: int, kernel: SDPBackend) -> int:
    """Most bytes alive during the forward and the backward pass of two sequences with checkpointing, but for logits."""
    adapted = attach_adapter(model, LoraConfig(rank=1), "model").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros((2, length), dtype=torch.long)
    with LiveBytes() as live, sdpa_kernel(kernel):
        output = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
        output.logits.sum().backward()
    return live.peak


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bound_holds_with_checkpointing(name: str, device: str, tmp_path: Path) -> None:
    model = built(name, 6)
    model.save_pretrained(tmp_path)
    planned = measure_footprint(
        tmp_path, dtype="bfloat16", max_length=192, batch_size=2, generation_batch_size=1, max_new_tokens=1,
        gradient_checkpointing=True, device=device,
    ).activations  # fmt: skip
    measured = peak_of_training(model, 192, SDPBackend.MATH if device == "cpu" else SDPBackend.FLASH_ATTENTION)
    assert measured <= planned <= 1.5 * measured


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("n_layer", {"n_embd": 256, "n_head": 4}),
    "gpt_neox": ("num_hidden_layers", SHAPE),
    "biogpt": ("num_hidden_layers", SHAPE),
    "mixtral": ("num_hidden_layers", {**SHAPE, "num_local_experts": 4}),
    "mamba": ("num_hidden_layers", {"hidden_size": 256, "state_size": 16}),
    "qwen3_5_text": (
        "num_hidden_layers",
        {**SHAPE, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
         "linear_value_head_dim": 32, "full_attention_interval": 100},
    ),
}  # fmt: skip


def other(name: str, layers: int) -> PreTrainedModel:
    key, config = OTHERS[name]
    made = AutoConfig.for_model(name, **{**config, "vocab_size": 100, "pad_token_id": 0, key: layers})
    return AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", OTHERS)
def test_the_bound_for_cpus_holds_whatever_a_family_calls_its_sizes(name: str, tmp_path: Path) -> None:
    """Of a layer that is one more; a mixture keeps its experts' weights once more, whatever the length."""
    other(name, 1).save_pretrained(tmp_path)
    planned = measure_footprint(
        tmp_path, dtype="bfloat16", max_length=320, batch_size=2, generation_batch_size=1, max_new_tokens=1
    ).activations
    kernel = SDPBackend.MATH
    measured = bytes_kept(other(name, 3), 320, kernel) - bytes_kept(other(name, 2), 320, kernel)
    assert measured <= planned
    assert planned <= 2 * measured or name == "mixtral"
