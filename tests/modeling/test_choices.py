"""Options of multiple-choice questions against plain transformers, as lm-eval reads its requests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semcons_ray.config import LoraConfig
from semcons_ray.messages import Turn
from semcons_ray.modeling.chat import ChatFormat
from semcons_ray.modeling.language_model import LanguageModel
from tests.tiny import train_tokenizer, write_model

QUESTIONS = [("which is more, two or six?", ("two", "six", "s i x")), ("add one and two", ("it is 3", "it is 4"))]


def model_of(folder: Path, max_length: int = 64) -> LanguageModel:
    return LanguageModel(str(folder), lora=LoraConfig(rank=4), dtype="float32", device="cpu", max_length=max_length)


def expected(folder: Path, context: str, continuation: str, **special: bool) -> float:
    """NLL of a continuation, whose tokens are those of the whole after as many as the context has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shown = context.rstrip()
    begin = len(tokenizer(shown, **special)["input_ids"])
    ids = tokenizer(context + continuation, **special)["input_ids"]
    with torch.no_grad():
        log_probs = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_probs[place - 1, ids[place]]) for place in range(begin, len(ids)))


@pytest.mark.parametrize("kind", ["chat", "base", "base with a beginning of sequence"])
def test_an_option_is_scored_as_lm_eval_does(tmp_path: Path, kind: str) -> None:
    marks: dict[str, Any] = {"bos": "<|im_start|>", "frame": "<|im_start|> $A"} if "beginning" in kind else {}
    write_model(
        tmp_path, "llama" if kind == "chat" else "gemma3", tokenizer=train_tokenizer(**marks) if marks else None
    )
    model = model_of(tmp_path)
    scored, tokens = model.option_nll(model.fresh_adapter(), QUESTIONS, 2)
    assert [len(one) for one in scored] == [3, 2]
    for (prompt, options), values in zip(QUESTIONS, scored, strict=True):
        for option, nll in zip(options, values, strict=True):
            if kind == "chat":
                context, between = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", ""
            else:
                context, between = f"Question: {prompt}\nAnswer:", " "
            assert nll == pytest.approx(expected(tmp_path, context, between + option), rel=1e-5)
    assert tokens > 0
    assert model.option_nll(model.fresh_adapter(), [("is there any?", ())], 2) == ([()], 0)


def test_an_option_of_a_conversation_follows_all_of_it(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    chat = ChatFormat(tokenizer, name="tiny", max_length=200)
    turns = (Turn("user", "add one and one"), Turn("assistant", "it is 2"), Turn("user", "add one and two"))
    text = chat.option(turns, "it is 3")
    asked = tokenizer.apply_chat_template(
        [turn._asdict() for turn in turns], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(text.ids) == asked + "it is 3"
    ((begin, end),) = text.learnt
    assert end == len(text.ids)
    assert tokenizer.decode(text.ids[begin:]).strip() == "it is 3"


def test_long_questions_lose_their_beginning_and_long_options_their_end(tiny_llama: Path) -> None:
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_llama), name="tiny", max_length=16)
    text = chat.option("add one and two " * 20, "it is 3")
    assert len(text.ids) == 16
    whole = ChatFormat(AutoTokenizer.from_pretrained(tiny_llama), name="tiny", max_length=400)
    assert text.ids == whole.option("add one and two " * 20, "it is 3").ids[-16:]
    assert chat.option("add one", "s i x " * 20).learnt == ((8, 16),)
