"""Which modules get an adapter, on models that have shapes and no weights; and an adapter on the output embedding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from semcons_ray.config import LoraConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.federation.weights import with_rank
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.lora import attach_adapter
from tests.tiny import SHAPE, build_model, write_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2},
    "gpt_neox": SHAPE,
    "phi": SHAPE,
    "opt": {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "mixtral": {**SHAPE, "num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "qwen3_5_text": {**SHAPE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8},
}  # fmt: skip


def base(family: str, device: str = "meta") -> Any:
    with torch.device(device):
        return build_model(family, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[family])


def adapted(family: str, targets: Any, device: str = "meta") -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors."""
    model = attach_adapter(base(family, device), LoraConfig(rank=4, target_modules=targets), "mine")
    return {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad}


def modules(family: str, targets: Any) -> set[str]:
    """Last names of the modules that get an adapter."""
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapted(family, targets)}


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("llama", ("q_proj", "v_proj"), 4),
        ("llama", ("self_attn.q_proj",), 2),
        ("llama", ("layers.1.self_attn.q_proj",), 1),
        ("llama", ("lm_head",), 1),
        ("gpt2", ("c_attn",), 2),
        ("gpt2", ("c_proj",), 4),
        ("gpt2", ("attn.c_proj",), 2),
        ("bloom", ("query_key_value",), 2),
        ("falcon", ("query_key_value", "dense"), 4),
        ("phi", ("dense", "fc1"), 4),
        ("mamba", ("x_proj",), 2),
        ("qwen3_5_text", ("q_proj",), 1),
        ("qwen3_5_text", ("in_proj_qkv",), 1),
    ],
)
def test_each_name_is_matched_at_the_end_of_paths(family: str, targets: tuple[str, ...], count: int) -> None:
    tensors = adapted(family, targets)
    assert len(tensors) == 2 * count
    assert {min(shape) for shape in tensors.values()} == {4}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("bloom", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mamba", {"in_proj", "x_proj", "dt_proj"}),
    ],
)
def test_all_linear_is_all_but_the_output_embedding_experts_and_what_kernels_read(family: str, names: set[str]) -> None:
    assert modules(family, "all-linear") == names
    ranks = {shape[0] for name, shape in adapted(family, "all-linear").items() if "lora_A" in name}
    assert ranks == {4}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_without_weights_it_is_the_adapter_that_a_loaded_model_gets(family: str) -> None:
    assert adapted(family, "all-linear") == adapted(family, "all-linear", "cpu")


LINEAR = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("family", "target", "says"),
    [
        ("llama", "v_prjo", "v_prjo names no module of mine; did you mean v_proj?"),
        ("llama", "Q_PROJ", "Q_PROJ names no module of mine; did you mean q_proj?"),
        ("llama", "c_attn", f"c_attn names no module of mine; linear ones are {LINEAR}"),
        ("llama", "proj", "proj names no module of mine"),
        ("gpt2", "c_atn", "c_atn names no module of mine; did you mean c_attn?"),
        ("bloom", "query_key_values", "did you mean query_key_value?"),
        ("llama", "embed_tokens", f"is of kind Embedding in mine, and adapters are for linear layers: {LINEAR}"),
        ("gpt2", "wte", "wte is of kind Embedding in mine"),
        ("llama", "self_attn", "self_attn is of kind LlamaAttention in mine"),
        ("llama", "input_layernorm", "input_layernorm is of kind LlamaRMSNorm in mine"),
        ("mamba", "conv1d", "conv1d is of kind Conv1d in mine"),
        ("mixtral", "gate_up_proj", "gate_up_proj is no module of mine but a tensor in one"),
        ("mixtral", "w1", "w1 names no module of mine"),
    ],
)  # fmt: skip
def test_a_name_that_fits_nothing_is_refused_beside_one_that_fits(family: str, target: str, says: str) -> None:
    fits = {"gpt2": "c_attn", "bloom": "dense", "mamba": "x_proj"}.get(family, "q_proj")
    with pytest.raises(ModelError) as caught:
        adapted(family, (fits, target))
    said = str(caught.value)
    assert said.startswith("model.lora.target_modules: ")
    assert says in said
    assert "\n" not in said


def test_a_module_that_peft_refuses_is_named_with_the_setting() -> None:
    with pytest.raises(ModelError, match=r"^model\.lora\.target_modules does not fit mine: [^\n]*out_proj[^\n]*$"):
        adapted("mamba", ("out_proj",))


PAIRS = [Pair("add one and two", "it is 3"), Pair("spell one two", "o n e")]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "whole modules": {"modules_to_save": ("lm_head", "embed")},
    "all": {"use_rslora": True, "use_dora": True, "init_lora_weights": "gaussian", "target_modules": ("q_proj", "fc1")},
}


def with_adapter(folder: Path, dtype: str = "float32", **lora: Any) -> LanguageModel:
    settings = LoraConfig.model_validate({"rank": 4, **lora})
    return LanguageModel(str(folder), lora=settings, dtype=dtype, device="cpu", max_length=64)


def plain_nll(model: Any, ours: LanguageModel) -> float:
    total = 0.0
    for pair in PAIRS:
        text = ours.chat.encode(pair.prompt, pair.response)
        ((begin, end),) = text.learnt
        labels = torch.tensor([[-100] * begin + text.ids[begin:]])
        with torch.no_grad():
            total += model(input_ids=torch.tensor([text.ids]), labels=labels).loss.item() * (end - begin)
    return total


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of the plain model
@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_an_exported_adapter_of_any_kind_scores_in_plain_peft_what_it_did_here(
    family: str, kind: str, rank: int, tmp_path: Path
) -> None:
    lora = {**KINDS[kind]}
    if family == "gpt2" and "target_modules" in lora:
        lora["target_modules"] = ("c_attn", "c_proj")
    if "modules_to_save" in lora:
        lora["modules_to_save"] = ("ln_f", "lm_head") if family == "gpt2" else ("embed_tokens", "lm_head")
    model = with_adapter(write_model(tmp_path / "model", family), **lora)
    adapter = with_rank(model.fresh_adapter(np.random.default_rng(3)), rank)
    before = model.negative_log_likelihood(adapter, PAIRS, 2).nll_sum
    training = TrainingConfig(learning_rate=1e-2, batch_size=2, local_epochs=4)
    model.fine_tune(adapter, PAIRS, training, np.random.default_rng(0))
    after = model.negative_log_likelihood(adapter, PAIRS, 2).nll_sum
    assert after < before
    (tmp_path / "adapter").mkdir()
    model.export_adapter(adapter, tmp_path / "adapter")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert plain_nll(plain, model) == pytest.approx(after, rel=1e-4)
    config = plain.active_peft_config
    assert (config.r, config.use_rslora, config.use_dora) == (rank, "use_rslora" in lora, "use_dora" in lora)
    assert config.lora_alpha == pytest.approx(16 * ((rank / 4) ** 0.5 if config.use_rslora else rank / 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_of_any_kind_changes_nothing(kind: str, dtype: str, tiny_llama: Path) -> None:
    lora = {key: value for key, value in KINDS[kind].items() if key != "target_modules"}
    lora |= {"modules_to_save": ("norm", "lm_head")} if "modules_to_save" in lora else {}
    model = with_adapter(tiny_llama, dtype, **lora)
    base = model.model.unload()
    adapted = with_adapter(tiny_llama, dtype, **lora)
    for drawn in (None, np.random.default_rng(0)):
        adapted.load_adapter(adapted.fresh_adapter(drawn))
        ids = torch.tensor([[1, 5, 9, 20]])
        with torch.no_grad():
            assert torch.equal(adapted.model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_modules_are_learnt_and_the_base_is_left_as_it_was(tied: bool, dtype: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", tie_word_embeddings=tied)
    model = with_adapter(folder, dtype, target_modules=("q_proj",), modules_to_save=("lm_head", "norm"))
    base = {key: value.clone() for key, value in model.model.named_parameters() if not value.requires_grad}
    adapter, fresh = model.fresh_adapter(), model.fresh_adapter()
    whole = {key for key in adapter if "modules_to_save" in key}
    assert {key.split(".modules_to_save")[0].rpartition(".")[2] for key in whole} == {
        "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    model.fine_tune(adapter, PAIRS, TrainingConfig(learning_rate=1e-2, batch_size=2), np.random.default_rng(0))
    assert all((adapter[key] != fresh[key]).any() for key in whole)
    after = model.negative_log_likelihood(adapter, PAIRS, 2).nll_sum
    assert after < model.negative_log_likelihood(fresh, PAIRS, 2).nll_sum
    assert all(torch.equal(value, base[key]) for key, value in model.model.named_parameters() if key in base)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lm_haed", "lm_haed names no module of mine; did you mean lm_head?"),
        ("zzz", "zzz names no module of mine; it has down_proj, embed_tokens, gate_proj, "),
        ("self_attn", "self_attn is of kind LlamaAttention in mine; name modules that have weights and none inside"),
        ("proj", "proj is the end of model.layers.0.self_attn.q_proj in mine; write the whole name"),
        ("rotary_emb", "rotary_emb is of kind LlamaRotaryEmbedding in mine; name modules that have weights"),
    ],
)
def test_a_whole_module_must_be_one_of_the_model(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=r"^model\.lora\.modules_to_save: ") as caught:
        attach_adapter(base("llama"), LoraConfig(modules_to_save=("norm", name)), "mine")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rs_lora_scales_by_the_root_of_the_rank(tiny_llama: Path) -> None:
    plain, rooted = with_adapter(tiny_llama), with_adapter(tiny_llama, use_rslora=True)
    adapter = plain.fresh_adapter()
    for key in [key for key in adapter if "lora_B" in key]:
        adapter[key] += 0.1
    twice = {key: value * (2 if "lora_B" in key else 1) for key, value in adapter.items()}  # 16 / sqrt(4), not 16 / 4
    expected = plain.negative_log_likelihood(twice, PAIRS, 2).nll_sum
    assert rooted.negative_log_likelihood(adapter, PAIRS, 2).nll_sum == pytest.approx(expected, rel=1e-6)
    beside = rooted.negative_log_likelihood(rooted.fresh_adapter(), PAIRS, 2, frozen=adapter).nll_sum
    assert beside == pytest.approx(expected, rel=1e-6)


def test_gaussian_adapters_are_drawn_as_wide_as_peft_draws_them(tiny_llama: Path) -> None:
    model = with_adapter(tiny_llama, init_lora_weights="gaussian")
    for generator in (None, np.random.default_rng(0)):
        drawn = torch.cat([value.flatten() for key, value in model.fresh_adapter(generator).items() if "lora_A" in key])
        assert float(drawn.std()) == pytest.approx(1 / 4, rel=0.05)
        assert float(drawn.abs().max()) > 3 / 4


def test_dora_learns_sizes_which_keep_their_small_changes_in_bfloat16(tiny_llama: Path) -> None:
    model = with_adapter(tiny_llama, "bfloat16", use_dora=True)
    adapter = model.fresh_adapter()
    sizes = {key: value.clone() for key, value in adapter.items() if "magnitude" in key}
    assert len(sizes) == 14
    model.fine_tune(adapter, PAIRS, TrainingConfig(learning_rate=1e-5, batch_size=2), np.random.default_rng(0))
    assert all((adapter[key] - sizes[key]).abs().max() > 5e-6 for key in sizes)
    held = {key: value for key, value in model.model.named_parameters() if "magnitude" in key}
    assert all(torch.equal(value.data, adapter[key]) for key, value in held.items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of the plain model
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_embedding_learns_and_leaves_the_input_embedding_alone(
    tied: bool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    lora = LoraConfig(rank=4, target_modules=("q_proj", "lm_head"))
    model = LanguageModel(str(folder), lora=lora, dtype="float32", device="cpu", max_length=64)
    embedding = model.model.get_input_embeddings().weight.clone()
    adapter = model.fresh_adapter()
    before = model.negative_log_likelihood(adapter, PAIRS, 2).nll_sum
    training = TrainingConfig(learning_rate=1e-2, batch_size=2, local_epochs=8)
    model.fine_tune(adapter, PAIRS, training, np.random.default_rng(0))
    after = model.negative_log_likelihood(adapter, PAIRS, 2).nll_sum
    assert after < 0.9 * before
    assert any("lm_head" in key and "lora_B" in key and value.any() for key, value in adapter.items())
    assert torch.equal(model.model.get_input_embeddings().weight, embedding)

    (tmp_path / "adapter").mkdir()
    model.export_adapter(adapter, tmp_path / "adapter")
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert plain_nll(plain, model) == pytest.approx(after, rel=1e-4)
