"""Checks, from a model's folder and without loading its weights, that the model can do what a run asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semcons_ray.config import Attention, GenerationConfig, ModelConfig, TrainingConfig
from semcons_ray.errors import ModelError, first_line
from semcons_ray.modeling.chat import load_tokenizer
from semcons_ray.modeling.model_folder import read_config

CAUSAL_WITHOUT_FLAG = {"gpt_neox", "gpt_neox_japanese"}
"""Families of causal models whose configuration has `is_decoder` false nevertheless."""

APART = {"full_attention", "sliding_attention"}
"""Kinds of layers that can keep texts in a row apart. Recurrent ones carry a state on, and attention in chunks counts
its chunks from the beginning of the row."""

HEADS = ("classifier", "summary")
"""How names of settings begin that are for other heads than a language model's."""

BOTH_WAYS = {"cpmant", "xlnet"}
"""Families that read what follows too, which nothing in their configuration says."""


def check_model(
    folder: Path,
    model: ModelConfig,
    training: Sequence[TrainingConfig],
    generation: Sequence[GenerationConfig],
    texts: Sequence[str],
) -> None:
    """Check the model `model.name`.

    Args:
        folder: Folder with the model's files.
        model: Settings of the model.
        training: Settings of local updates of the clients that have it.
        generation: Their settings of answers.
        texts: All texts of the data that the model is going to read.

    Raises:
        ModelError: It is not a causal language model of text alone, the folder holds an adapter, the adapter to be
            trained does not fit it, it cannot be trained as the settings say, it has too few positions, or its
            tokenizer is missing or does not fit it. The message says what to change.
    """
    name = model.name
    _check_adapter(folder, name)
    config = read_config(folder)
    _check_kind(config, name)
    base = _without_weights(config, name)
    if model.attn_implementation:
        _check_attention(base, model.attn_implementation, name)
    _check_positions(config, model, max(settings.max_new_tokens for settings in generation))
    if any(settings.gradient_checkpointing for settings in training):
        _check_checkpointing(base, name)
    if any(settings.packing for settings in training):
        _check_packing(base, name)
    if any(settings.train_together > 1 for settings in training):
        _check_together(config, name)
    _check_tokenizer(folder, base.get_input_embeddings().weight.shape[0], name, texts)
    from semcons_ray.modeling.lora import attach_adapter

    attach_adapter(base, model.lora, name)


def _check_adapter(folder: Path, name: str) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model {name} holds an adapter (adapter_config.json), which would be left out: merge it into its base "
            "(PEFT's merge_and_unload, then save_pretrained, the tokenizer's too) and name that folder, or take it away"
        )


def _check_kind(config: Any, name: str) -> None:
    kind = config.model_type
    flags = {} if kind in CAUSAL_WITHOUT_FLAG else {"is_decoder": False}
    flags |= {"is_causal": False, "causal": False, "use_bidirectional_attention": True}
    both_ways = kind in BOTH_WAYS or any(getattr(config, flag, None) is value for flag, value in flags.items())
    if config.is_encoder_decoder or both_ways:
        what = "an encoder with a decoder" if config.is_encoder_decoder else "an encoder, which reads what follows too"
        raise ModelError(f"model {name} ({kind}) is {what}; model.name takes causal language models")


def _without_weights(config: Any, name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        raise ModelError(
            f"model {name} ({config.model_type}) is not one of transformers' causal language models: "
            f"{first_line(error)}"
        ) from error
    config = base.config
    sees_or_hears = any(name.startswith(("vision", "audio")) for name in config.sub_configs)
    if sees_or_hears or config.get_text_config(decoder=True) is not config:
        raise ModelError(
            f"model {name} ({config.model_type}) takes more than text; model.name takes models of text alone, which "
            "many families have beside these"
        )
    return base


def _check_attention(base: Any, implementation: Attention, name: str) -> None:
    try:
        base.get_correct_attn_implementation(implementation, is_init_check=True)
    except ValueError as error:
        raise ModelError(
            f"model.attn_implementation {implementation} does not fit {name}: {first_line(error)}"
        ) from error
    except ImportError:
        pass  # a GPU, and the package for it, need not be on this machine; where they are missing, loading says so


def _check_checkpointing(base: Any, name: str) -> None:
    try:
        base.gradient_checkpointing_enable()
    except ValueError as error:
        raise ModelError(f"training.gradient_checkpointing does not fit {name}: {first_line(error)}") from error
    base.gradient_checkpointing_disable()


def _check_packing(base: Any, name: str) -> None:
    """Check that a row may hold several texts: attention can be kept within each, and positions begin again."""
    from semcons_ray.modeling.decoding import Decoding

    config = base.config
    others = {*(getattr(config, "layer_types", None) or ())} - APART
    if Decoding.of(base).pads and not others and not getattr(config, "alibi", False):
        return
    why = f"has layers of kind {', '.join(sorted(others))}" if others else "does not tell texts apart by position_ids"
    raise ModelError(f"training.packing does not fit {name}: a {config.model_type} model {why}; set it to false")


def _check_together(config: Any, name: str) -> None:
    """Check that nothing is dropped out: what is drawn for a client's batch cannot be drawn for its rows in another."""
    drops = {key: value for key, value in config.to_dict().items() if "drop" in key and not key.startswith(HEADS)}
    for key, share in drops.items():
        if isinstance(share, float) and share > 0:
            raise ModelError(
                f"training.train_together does not fit {name}: its config.json has {key} {share:g}, and dropout is "
                "drawn for a client's own batches; set that to 0, or train_together to 1"
            )


def longest(folder: Path) -> int | None:
    """Most tokens that the model in a folder can read; None: there is no limit.

    Raises:
        ModelError: Its config.json cannot be read.
    """
    return _positions(read_config(folder).get_text_config(decoder=True))


def _check_positions(config: Any, model: ModelConfig, max_new_tokens: int) -> None:
    limit, needed = _positions(config.get_text_config(decoder=True)), model.num_tokens + max_new_tokens
    if limit is not None and needed > limit:
        raise ModelError(
            f"model {model.name} has {limit} positions, and model.max_length {model.max_length} + "
            f"generation.max_new_tokens {max_new_tokens} are {needed}; lower one of them"
        )


def _positions(config: Any) -> int | None:
    """Most tokens that a model can read; None: there is no limit."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if limit is None or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for scaled in rope.values() if all(isinstance(one, dict) for one in rope.values()) else [rope]:
        stretched = scaled.get("original_max_position_embeddings")
        if stretched is None and scaled.get("rope_type") in ("dynamic", "yarn"):
            stretched = limit
        limit = max(limit, int((scaled.get("factor") or 1) * (stretched or 0)))
    return int(limit)


def _check_tokenizer(folder: Path, rows: int, name: str, texts: Sequence[str]) -> None:
    """Check that an embedding of `rows` rows has every token that a text can contain.

    Tokens beyond the last row are allowed if no text contains them: padding, which is masked, and the added tokens that
    many families have for images or sounds.
    """
    tokenizer = load_tokenizer(name, folder)
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ModelError(f"cannot load model {name}: no files of a tokenizer are in its folder")
    seldom = set(tokenizer.get_added_vocab()) - {tokenizer.eos_token, tokenizer.bos_token}
    read = [str(tokenizer.chat_template), *texts]
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        index = vocabulary[token]
        if index >= rows and (token not in seldom or any(token in text for text in read)):
            raise ModelError(
                f"model {name}: its tokenizer makes token {token!r} number {index}, and its embedding has {rows} rows; "
                "resize it (resize_token_embeddings) and save the model again, or choose another model.name"
            )
