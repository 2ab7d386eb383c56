"""Sizes of a model's layers, read from its configuration under whatever names its family uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import Any

from semcons_ray.errors import ModelError

DELTA_CHUNK = 64
"""Number of tokens in a chunk of a gated delta net."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model's layers; where layers differ, of the largest.

    Attributes:
        width: Size of a hidden vector.
        layers: Number of layers.
        heads: Attention heads; 1 if there is no attention.
        head_width: Size of a head.
        key_values: Numbers that a layer's key-value cache holds for a token.
        feed_forward: Inner width of the feed-forward layer; in a mixture, of all experts of a token together.
        experts: Experts that a token passes through; 0 if there are none.
        vocabulary: Logits of a token.
        drops_attention: Whether training uses dropout on attention weights, which keeps them three times.
        state: Float32 numbers that a recurrent layer keeps for a token for the backward pass, in transformers' own
        code. working: Float32 numbers that such a layer needs for a token while it computes, and does not keep.
        chunk: The number of tokens is padded to a multiple of this by recurrent layers.
    """

    width: int
    layers: int
    heads: int
    head_width: int
    key_values: int
    feed_forward: int
    experts: int
    vocabulary: int
    drops_attention: bool
    state: int
    working: int
    chunk: int

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Read them from a configuration of transformers.

        Raises:
            ModelError: It does not say how wide the model is, or how many layers it has.
        """
        config = config.get_text_config(decoder=True)
        width, layers = _largest(config, "hidden_size"), _largest(config, "num_hidden_layers")
        if not width or not layers:
            raise ModelError(
                f"config.json of a {config.model_type} model has no hidden_size or no num_hidden_layers, by which its "
                "memory is planned"
            )
        heads = _largest(config, "num_attention_heads") or 1
        head_width = _largest(config, "head_dim", "qk_head_dim", "v_head_dim") or width // heads
        experts = _largest(config, "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
        expert = _largest(config, "moe_intermediate_size")
        dense = _largest(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim") or 4 * width
        shared = _largest(config, "n_shared_experts") * expert + _largest(
            config, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"
        )
        state, working, chunk = _recurrent(config, width)
        return cls(
            width=width,
            layers=layers,
            heads=heads,
            head_width=head_width,
            key_values=2 * (_largest(config, "num_key_value_heads", "num_kv_heads") or heads) * head_width,
            feed_forward=max(dense, experts * (expert or dense) + shared),
            experts=experts,
            vocabulary=_largest(config, "vocab_size"),
            drops_attention=any(_numbers(config, "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")),
            state=state,
            working=working,
            chunk=chunk,
        )

    def padded(self, tokens: int) -> int:
        """Number of tokens on which a recurrent layer computes, padding included, for a text of `tokens` tokens."""
        return ceil(tokens / self.chunk) * self.chunk


def _recurrent(config: Any, width: int) -> tuple[int, int, int]:
    """`Dimensions.state`, `working` and `chunk`: measured with Mamba, Mamba 2, Falcon H1 and Qwen3.5, and rounded
    up."""
    if delta_heads := _largest(config, "linear_num_value_heads", "linear_num_heads"):
        key, value = _largest(config, "linear_key_head_dim"), _largest(config, "linear_value_head_dim")
        return delta_heads * (7 * (key + value) + 6 * DELTA_CHUNK + 3 * key * value // DELTA_CHUNK), 0, DELTA_CHUNK
    size = _largest(config, "mamba_d_state", "ssm_state_size", "state_size")
    if not size:
        return 0, 0, 1
    chunk = _largest(config, "mamba_chunk_size", "chunk_size")
    heads = _largest(config, "mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    if chunk and heads:  # Mamba 2
        return heads * (6 * chunk + 2 * size), 3 * chunk * heads * size, chunk
    inner = (_largest(config, "mamba_expand", "expand") or 2) * width
    return 4 * inner * size, 0, 1


def _largest(config: Any, *names: str) -> int:
    """The largest number that a configuration has under any of these names; 0 if there is none."""
    return int(max(_numbers(config, *names), default=0))


def _numbers(config: Any, *names: str) -> list[float]:
    """What a configuration has under these names, in any layer, else in the parts that some families give it."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return _named(layers, names) or _named(parts, names)


def _named(configs: Iterable[Any], names: Iterable[str]) -> list[float]:
    values = [getattr(config, name, None) for config in configs for name in names]
    each = chain.from_iterable(value if isinstance(value, (list, tuple)) else [value] for value in values)
    return [value for value in each if isinstance(value, (int, float))]
