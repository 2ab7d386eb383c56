"""What a model cannot do is said in one line before it is loaded, and what it can is let through: without weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoConfig, PreTrainedTokenizerFast

from semcons_ray.config import GenerationConfig, ModelConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.modeling.fit import check_model
from semcons_ray.modeling.packaged import CHATML
from tests.tiny import SHAPE, train_tokenizer

NEEDED = 20
"""Positions: 16 of a text and 4 of an answer."""

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAR = 10**7


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(template=CHATML)


def describe(folder: Path, tokenizer: PreTrainedTokenizerFast, architecture: str, **config: Any) -> Path:
    """A folder with all of a model but its weights."""
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    AutoConfig.for_model(architecture, **{**ids, **config}).save_pretrained(folder)
    return folder


def check(
    folder: Path,
    *,
    texts: tuple[str, ...] = (),
    max_length: int = 16,
    training: Sequence[TrainingConfig] = (TrainingConfig(),),
    attn_implementation: str | None = None,
    **lora: Any,
) -> None:
    settings = {"max_length": max_length, "attn_implementation": attn_implementation, "lora": lora}
    model = ModelConfig.model_validate({"name": str(folder), **settings})
    check_model(folder, model, training, [GenerationConfig(max_new_tokens=4)], texts)


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        check(folder, **settings)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said
    return said


POSITIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "max_position_embeddings", SHAPE),
    "gpt2": ("gpt2", "n_positions", GPT),
    "gptj": ("gptj", "n_positions", {**GPT, "rotary_dim": 4}),
    "ctrl": ("ctrl", "n_positions", {**GPT, "dff": 64}),
    "opt": ("opt", "max_position_embeddings", {**SHAPE, "ffn_dim": 64}),
    "phi": ("phi", "max_position_embeddings", SHAPE),
    "falcon": ("falcon", "max_position_embeddings", {"hidden_size": 32, "num_attention_heads": 4}),
    "gpt_neo": ("gpt_neo", "max_position_embeddings",
                {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "mpt": ("mpt", "max_seq_len", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_a_text_and_its_answer_must_have_positions(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    architecture, key, config = POSITIONS[name]
    check(describe(tmp_path / "enough", tokenizer, architecture, **config, **{key: NEEDED}))
    said = refusal(describe(tmp_path / "few", tokenizer, architecture, **config, **{key: NEEDED - 1}))
    assert f"has {NEEDED - 1} positions" in said
    assert "model.max_length 16 + generation.max_new_tokens 4 are 20; lower one of them" in said


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}),
        ("falcon", {"hidden_size": 32, "num_attention_heads": 4, "alibi": True, "max_position_embeddings": 8}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}),
    ],
)
def test_some_families_have_no_last_position(
    architecture: str, config: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    check(describe(tmp_path, tokenizer, architecture, **config), max_length=FAR)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 40),
        ({"rope_type": "yarn", "factor": 4.0}, 160),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, 40),
        ({"rope_type": "dynamic", "factor": 2.0}, 80),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 20, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0},
            160,
        ),
    ],
)  # fmt: skip
def test_positions_that_were_stretched_count(
    rope: dict[str, Any], positions: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = describe(
        tmp_path, tokenizer, "llama", **SHAPE, max_position_embeddings=40,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    check(folder, max_length=positions - 4)
    assert f"has {positions} positions" in refusal(folder, max_length=positions - 3)


def test_positions_are_those_of_the_layers_that_reach_farthest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gemma 3 turns those of full attention only by a factor."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0},
    }
    folder = describe(
        tmp_path, tokenizer, "gemma3_text", **SHAPE, head_dim=8, max_position_embeddings=40, rope_parameters=rope
    )
    check(folder, max_length=76)
    assert "has 80 positions" in refusal(folder, max_length=77)


ENCODER = "is an encoder, which reads what follows too"
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", SHAPE, ENCODER),
    "roberta": ("roberta", SHAPE, ENCODER),
    "electra": ("electra", SHAPE, ENCODER),
    "xlm": ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, ENCODER),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, ENCODER),
    "cpmant": ("cpmant", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8}, ENCODER),
    "an embedder of Gemma's": ("gemma3_text", {**SHAPE, "use_bidirectional_attention": True}, ENCODER),
    "modernbert": ("modernbert", SHAPE, "is not one of transformers' causal language models"),
    "t5": ("t5", {"d_model": 32, "num_layers": 2}, "is an encoder with a decoder"),
    "bart": ("bart", {"d_model": 32}, "is an encoder with a decoder"),
    "whisper": ("whisper", {"d_model": 32}, "is an encoder with a decoder"),
    "git": ("git", SHAPE, "takes more than text"),
    "moshi": ("moshi", SHAPE, "takes more than text"),
    "llava": ("llava", {}, "is not one of transformers' causal language models"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_causal_language_model_of_text_is_refused(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    architecture, config, says = OTHERS[name]
    said = refusal(describe(tmp_path, tokenizer, architecture, **config))
    assert says in said
    assert f"({architecture})" in said


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("bert", {**SHAPE, "is_decoder": True}), ("gpt_neox", SHAPE), ("xglm", {"d_model": 32})],
)
def test_what_reads_from_left_to_right_is_taken_whatever_its_family(
    architecture: str, config: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    check(describe(tmp_path, tokenizer, architecture, **config))


@pytest.mark.parametrize("text", [None, "{}", "{", '{"model_type": "gpt7"}'])
def test_a_configuration_that_says_nothing_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert "its config.json: " in refusal(tmp_path)


def test_an_adapter_in_the_folder_is_not_left_out_in_silence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    check(describe(tmp_path, tokenizer, "llama", **SHAPE))
    (tmp_path / "adapter_config.json").write_text("{}")
    said = refusal(tmp_path)
    assert "holds an adapter" in said
    assert "merge_and_unload" in said


def test_targets_are_checked_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = describe(tmp_path, tokenizer, "llama", **SHAPE)
    said = refusal(folder, target_modules=["v_prjo"])
    assert "model.lora.target_modules: v_prjo names no module" in said
    check(folder, target_modules=["v_proj"])


def test_attention_must_be_one_that_the_family_has(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    llama = describe(tmp_path / "llama", tokenizer, "llama", **SHAPE)
    for has in ("eager", "sdpa", "flash_attention_2", "flex_attention"):  # whether a GPU is here or not
        check(llama, attn_implementation=has)
    bloom = describe(tmp_path / "bloom", tokenizer, "bloom", hidden_size=32, n_head=4, n_layer=2)
    check(bloom, attn_implementation="eager")
    for lacks in ("sdpa", "flash_attention_2", "flex_attention"):
        said = refusal(bloom, attn_implementation=lacks)
        assert said.startswith(f"model.attn_implementation {lacks} does not fit {bloom}: BloomForCausalLM does not sup")


HYBRID = {**SHAPE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
CHUNKED = {**SHAPE, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2, "head_dim": 8,
           "intermediate_size_mlp": 64}  # fmt: skip
NOT_PACKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "has layers of kind linear_attention"),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2}, "does not tell texts apart by position_ids"),
    "qwen3_5": ("qwen3_5_text", HYBRID, "has layers of kind linear_attention"),
    "llama4": ("llama4_text", CHUNKED, "has layers of kind chunked_attention"),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}, "does not tell texts apart"),
    "falcon with ALiBi": ("falcon", {"hidden_size": 32, "num_attention_heads": 4, "alibi": True}, "does not tell"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "does not tell"),
}


@pytest.mark.parametrize("name", NOT_PACKED)
def test_packing_is_refused_where_texts_in_a_row_cannot_be_kept_apart(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    architecture, config, says = NOT_PACKED[name]
    folder = describe(tmp_path, tokenizer, architecture, **config)
    check(folder)
    said = refusal(folder, training=[TrainingConfig(packing=True)])
    assert said.startswith(f"training.packing does not fit {folder}: a {architecture} model {says}")


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen2", "mistral", "phi3", "gpt_neox"])
def test_packing_is_for_families_that_tell_texts_apart_by_their_positions(
    architecture: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = describe(tmp_path, tokenizer, architecture, **SHAPE)
    check(folder, training=[TrainingConfig(packing=True)])


def test_checkpointing_is_for_families_that_have_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    checkpointed = [TrainingConfig(), TrainingConfig(gradient_checkpointing=True)]
    check(describe(tmp_path / "gpt2", tokenizer, "gpt2", **GPT), training=checkpointed)
    ctrl = describe(tmp_path / "ctrl", tokenizer, "ctrl", **GPT, dff=64)
    check(ctrl)
    said = refusal(ctrl, training=checkpointed)
    assert said.startswith("training.gradient_checkpointing does not fit ")
    assert "CTRLLMHeadModel does not support gradient checkpointing" in said


# The tokenizer's fit -------------------------------------------------------------------------------------------------


def test_padding_may_lie_outside_the_embedding_but_where_texts_hold_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == rows
    folder = describe(tmp_path, tokenizer, "llama", **SHAPE, vocab_size=rows)
    check(folder, texts=("pad this",))
    assert f"makes token '<pad>' number {rows}" in refusal(folder, texts=("see <pad>",))


def test_padding_that_also_ends_texts_may_not(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<end>", "eos_token": "<end>"})
    said = refusal(describe(tmp_path, tokenizer, "llama", **SHAPE, vocab_size=rows))
    assert f"token '<end>' number {rows}, and its embedding has {rows} rows; resize it" in said


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    last = len(tokenizer) - 1
    check(describe(tmp_path / "larger", tokenizer, "llama", **SHAPE, vocab_size=last + 64))
    check(describe(tmp_path / "equal", tokenizer, "llama", **SHAPE, vocab_size=last + 1))
    said = refusal(describe(tmp_path / "smaller", tokenizer, "llama", **SHAPE, vocab_size=last))
    word = tokenizer.convert_ids_to_tokens(last)
    assert f"makes token {word!r} number {last}, and its embedding has {last} rows" in said


@pytest.mark.parametrize("where", ["nowhere", "a text", "the template"])
def test_an_added_token_beyond_the_embedding_matters_where_it_is_read(
    where: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    if where == "the template":
        tokenizer.chat_template = "<image>" + CHATML
    folder = describe(tmp_path, tokenizer, "llama", **SHAPE, vocab_size=rows)
    texts = ("see <image>",) if where == "a text" else ("see this",)
    if where == "nowhere":
        check(folder, texts=texts)
    else:
        assert f"makes token '<image>' number {rows}" in refusal(folder, texts=texts)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    describe(tmp_path, tokenizer, "llama", **SHAPE)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    assert "tokenizer" in refusal(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
