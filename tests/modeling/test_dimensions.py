"""How large layers are, by hand, whatever a family calls their sizes."""

from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from semcons_ray.errors import ModelError
from semcons_ray.modeling.dimensions import Dimensions
from tests.tiny import SHAPE


def dimensions(architecture: str, **config: Any) -> Dimensions:
    return Dimensions.of(AutoConfig.for_model(architecture, **{"vocab_size": 100, **config}))


PLAIN = {"vocabulary": 100, "experts": 0, "state": 0, "working": 0, "chunk": 1, "drops_attention": False}
NAMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        SHAPE,
        {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "key_values": 2 * 2 * 8, "feed_forward": 64},
    ),
    "qwen3": (
        {**SHAPE, "head_dim": 16},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 16, "key_values": 2 * 2 * 16, "feed_forward": 64},
    ),
    "gpt2": (
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.1},
        {"width": 48, "layers": 3, "heads": 4, "head_width": 12, "key_values": 2 * 48, "feed_forward": 4 * 48,
         "drops_attention": True},
    ),
    "gptj": (
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 100},
        {"width": 48, "layers": 3, "heads": 4, "head_width": 12, "key_values": 2 * 48, "feed_forward": 100},
    ),
    "gpt_neo": (
        {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        {"width": 48, "layers": 2, "heads": 4, "head_width": 12, "key_values": 2 * 48, "feed_forward": 4 * 48},
    ),
    "opt": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "key_values": 2 * 32, "feed_forward": 96},
    ),
    "bloom": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "key_values": 2 * 32, "feed_forward": 4 * 32},
    ),
    "falcon": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
         "new_decoder_architecture": True, "ffn_hidden_size": 80},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "key_values": 2 * 2 * 8, "feed_forward": 80},
    ),
    "biogpt": (
        {**SHAPE, "attention_probs_dropout_prob": 0.1},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "key_values": 2 * 2 * 8, "feed_forward": 64,
         "drops_attention": True},
    ),
    "mpt": (
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"attn_pdrop": 1}},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "key_values": 2 * 32, "feed_forward": 4 * 32,
         "drops_attention": True},
    ),
    "deepseek_v2": (
        {**SHAPE, "num_key_value_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
         "moe_intermediate_size": 10, "n_shared_experts": 2},
        {"width": 32, "layers": 2, "heads": 4, "head_width": 24, "key_values": 2 * 4 * 24, "feed_forward": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", NAMES)
def test_sizes_by_the_names_of_each_family(architecture: str) -> None:
    config, sizes = NAMES[architecture]
    assert dimensions(architecture, **config) == Dimensions(**{**PLAIN, **sizes})


@pytest.mark.parametrize(
    ("architecture", "config", "experts", "feed_forward"),
    [
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2, 2 * 64),
        ("qwen3_moe", {"moe_intermediate_size": 16, "num_experts_per_tok": 3}, 3, 64),  # a dense layer's
        ("qwen3_moe", {"moe_intermediate_size": 48, "num_experts_per_tok": 3}, 3, 3 * 48),
        (
            "qwen2_moe",
            {"moe_intermediate_size": 40, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 20},
            3,
            3 * 40 + 20,
        ),
        ("deepseek_v3", {"moe_intermediate_size": 40, "num_experts_per_tok": 3, "n_shared_experts": 2}, 3, 5 * 40),
    ],
)
def test_a_token_passes_through_several_experts(
    architecture: str, config: dict[str, Any], experts: int, feed_forward: int
) -> None:
    found = dimensions(architecture, **SHAPE, **config)
    assert (found.experts, found.feed_forward) == (experts, feed_forward)


def test_sizes_may_stand_in_a_part_of_the_configuration() -> None:
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    found = dimensions("dbrx", d_model=32, n_heads=4, n_layers=2, ffn_config=ffn, attn_config={"kv_n_heads": 2})
    assert (found.experts, found.feed_forward, found.key_values) == (2, 2 * 48, 2 * 2 * 8)


def test_of_layers_that_differ_the_largest_counts() -> None:
    found = dimensions("gemma3n_text", **{**SHAPE, "intermediate_size": [64, 96]}, head_dim=8)
    assert found.feed_forward == 96


DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
             "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MAMBA_2 = {"n_groups": 1, "chunk_size": 16}


@pytest.mark.parametrize(
    ("architecture", "config", "state", "working", "chunk"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, 0, 0, 1),
        ("qwen3_5_text", DELTA_NET, 4 * (7 * 24 + 6 * 64 + 3 * 8 * 16 // 64), 0, 64),
        ("qwen3_next", DELTA_NET, 4 * (7 * 24 + 6 * 64 + 3 * 8 * 16 // 64), 0, 64),
        ("mamba", {"state_size": 8, "expand": 2}, 4 * 64 * 8, 0, 1),
        ("falcon_mamba", {"state_size": 8, "expand": 3}, 4 * 96 * 8, 0, 1),
        ("mamba2", {**MAMBA_2, "state_size": 8, "num_heads": 4, "head_dim": 16}, 4 * (96 + 16), 3 * 16 * 4 * 8, 16),
        (
            "falcon_h1",
            {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 32},
            4 * (192 + 16),
            3 * 32 * 4 * 8,
            32,
        ),
        ("jamba", {"mamba_d_state": 8, "mamba_expand": 2}, 4 * 64 * 8, 0, 1),
    ],
)
def test_what_recurrent_layers_keep_of_a_token(
    architecture: str, config: dict[str, Any], state: int, working: int, chunk: int
) -> None:
    found = dimensions(architecture, **SHAPE, **config)
    assert (found.state, found.working, found.chunk) == (state, working, chunk)


@pytest.mark.parametrize(("tokens", "padded"), [(1, 64), (64, 64), (65, 128)])
def test_recurrent_layers_work_on_whole_chunks(tokens: int, padded: int) -> None:
    assert dimensions("qwen3_5_text", **SHAPE, **DELTA_NET).padded(tokens) == padded
    assert dimensions("llama", **SHAPE).padded(tokens) == tokens


def test_of_a_model_with_more_than_text_it_is_the_text_s_part() -> None:
    assert Dimensions.of(AutoConfig.for_model("gemma3", text_config={**SHAPE, "vocab_size": 100})).width == 32


def test_a_configuration_that_does_not_say_how_large_it_is() -> None:
    with pytest.raises(ModelError, match=r"has no hidden_size or no num_hidden_layers"):
        Dimensions.of(PreTrainedConfig())
