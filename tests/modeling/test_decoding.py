"""Answers of every kind of family are those that its model gives when it is asked for one alone, without a cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from semcons_ray.config import GenerationConfig, LoraConfig
from semcons_ray.modeling.decoding import chosen_tokens
from semcons_ray.modeling.language_model import LanguageModel
from tests.tiny import write_model

PROMPTS = [f"add one and {word}" for word in ("two", "four", "two and five", "ten", "six", "one", "two and eleven")]
DELTA_NET = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "head_dim": 8,
             "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
MAMBA_2 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
           "mamba_chunk_size": 16}  # fmt: skip

PADDED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {"sliding_window": 8},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 4, "head_dim": 8},
}
OF_ONE_LENGTH: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": {**DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": MAMBA_2,
    "bamba": {**MAMBA_2, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "bloom": {"n_head": 4},
    "trocr": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
}  # fmt: skip
WITHOUT_CACHE: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "block_types": ["recurrent", "attention"],
                        "attention_window_size": 64},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "head_dim": 8,
                "block_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "chunk_size": 16},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip
ALL = PADDED | OF_ONE_LENGTH | WITHOUT_CACHE


def load(folder: Path, architecture: str) -> LanguageModel:
    """With weights so large that what a token follows decides it."""
    write_model(folder, architecture, **ALL[architecture])
    model = LanguageModel(str(folder), lora=LoraConfig(rank=4), dtype="float32", device="cpu", max_length=64)
    with torch.no_grad():
        for value in model.model.parameters():
            if value.ndim > 1:
                value.mul_(4)
    model.ends = [*range(0, 400, 7)]  # so that answers leave their batches one after another
    return model


@dataclass(frozen=True)
class Answer:
    """Ids of a prompt and of its answer, and the numbers that decided on them."""

    prompt: list[int]
    ids: list[int]
    draws: NDArray[np.float64]


def answered(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> list[Answer]:
    answers: list[Answer] = []
    written = LanguageModel._written

    def spy(
        self: LanguageModel, texts: list[list[int]], settings: GenerationConfig, draws: NDArray[np.float64]
    ) -> list[list[list[int]]]:
        samples = written(self, texts, settings, draws)
        for rows, theirs in zip(samples, draws, strict=True):
            answers.extend(map(Answer, texts, rows, theirs))
        return samples

    settings = GenerationConfig(max_new_tokens=16, temperature=1.0, batch_size=batch_size, num_samples=2)
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "_written", spy)
        model.generate(model.fresh_adapter(), PROMPTS, settings, np.random.default_rng(0))
    return sorted(answers, key=lambda answer: answer.draws[0])


@torch.no_grad()
def is_plain(model: LanguageModel, answer: Answer) -> bool:
    """Whether the model, shown all of the text for each token, gives these tokens for these numbers."""
    ids = list(answer.prompt)
    for token, draw in zip(answer.ids, answer.draws, strict=False):
        logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        if chosen_tokens(logits, GenerationConfig(), torch.tensor([draw], dtype=torch.float64)).item() != token:
            return False
        ids.append(token)
    return True


@pytest.mark.parametrize("architecture", ALL)
def test_answers_are_those_of_the_plain_model_for_each_prompt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    model = load(tmp_path, architecture)
    together, alone = (answered(model, monkeypatch, size) for size in (4, 1))
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({len(answer.ids) for answer in together}) > 2, "answers did not leave their batches one by one"
    assert all(is_plain(model, answer) for answer in together)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_5_text", "rwkv"])
def test_how_a_family_is_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """Padded, with a cache; by equal lengths, with a cache; by equal lengths, the whole text for each token."""
    model = load(tmp_path, architecture)
    shapes: list[torch.Size] = []
    masked: list[bool] = []
    forward = model.model.forward

    def spy(**inputs: torch.Tensor) -> object:
        shapes.append(inputs["input_ids"].shape)
        masked.append("attention_mask" in inputs)
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", spy)
    lengths = [len(answer.prompt) for answer in answered(model, monkeypatch, 4)]
    begun = [rows for rows, tokens in shapes if tokens in lengths]
    assert max(begun) == min(4, max(lengths.count(length) for length in lengths) if architecture != "llama" else 4)
    assert any(masked) == (architecture == "llama")  # only where there is padding
    assert any(tokens == 1 for _, tokens in shapes) == (architecture != "rwkv")
