"""The text that a model family expects, in small forms of the families' own chat templates."""

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from semcons_ray.config import ExperimentConfig, GenerationConfig, LoraConfig, dump_config, load_config
from semcons_ray.errors import ConfigError, ModelError
from semcons_ray.messages import Turn
from semcons_ray.modeling import chat as chat_file
from semcons_ray.modeling.chat import ChatFormat, Encoded, read_formats
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import CHATML, locate, resolve_model
from tests.tiny import train_tokenizer, write_model

QUESTION, ANSWER = "add one and two", "it is 3"
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
LEAVES_SYSTEM_OUT = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
TODAY = "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML


@dataclass(frozen=True)
class Family:
    """A chat template, and what its tokenizer has besides the pad token."""

    template: str
    marks: tuple[str, ...]
    end: str
    eos: str | None = None
    bos: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self, **settings: Any) -> PreTrainedTokenizerFast:
        marks = ("<pad>", *self.marks)
        return train_tokenizer(marks, eos=self.eos or self.end, bos=self.bos, template=self.template, **settings)


LLAMA3 = Family(
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}"
    "{% endif %}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    end="<|eot_id|>",
    eos="<|end_of_text|>",
    bos="<|begin_of_text|>",
)
GEMMA = Family(
    "{{ bos_token }}" + REFUSES_SYSTEM + "{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    end="<end_of_turn>",
    eos="<eos>",
    bos="<bos>",
)
PHI = Family(
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    end="<|end|>",
    eos="<|endoftext|>",
)
MISTRAL = Family(
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    end="</s>",
    bos="<s>",
)
THOUGHT = "<think>\n\n</think>\n\n"
QWEN3 = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}{{ '" + THOUGHT + "' }}{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '" + THOUGHT + "' }}{% endif %}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    end="<|im_end|>",
)
WITHOUT_THOUGHT = Family(QWEN3.template, QWEN3.marks, QWEN3.end, kwargs={"enable_thinking": False})
CHANNELS = Family(
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "{{ '<|message|>' + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    end="<|return|>",
)
CHAT = Family(CHATML, ("<|im_start|>", "<|im_end|>"), end="<|im_end|>")
FAMILIES = {
    "ChatML": CHAT,
    "Llama 3": LLAMA3,
    "Gemma": GEMMA,
    "Phi": PHI,
    "Mistral": MISTRAL,
    "Qwen 3": QWEN3,
    "Qwen 3 without a thought": WITHOUT_THOUGHT,
    "channels": CHANNELS,
}


def chat(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> ChatFormat:
    return ChatFormat(tokenizer, name="m", **{"max_length": 400, **settings})


def parted(encoded: Encoded) -> tuple[list[int], int]:
    """Ids of a text with one response, which is its end, and the length of its prompt."""
    [(begin, end)] = encoded.learnt
    assert end == len(encoded.ids)
    return encoded.ids, begin


def own_ids(tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str], **options: Any) -> list[int]:
    """What the family's own flow gives, on the day that our runs have."""
    conversation = [{"role": role, "content": content} for role, content in turns]
    today = date(2024, 7, 26).strftime
    return list(
        tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, strftime_now=today, **options)
    )


@pytest.mark.parametrize("spaces", ["bytes", "prepended"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_family_s_own_flow_up_to_the_end_of_the_turn(name: str, spaces: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer(spaces=spaces)
    ours = chat(tokenizer, template_kwargs=family.kwargs)
    prompt = own_ids(tokenizer, ("user", QUESTION), add_generation_prompt=True, **family.kwargs)
    assert ours.prompt_ids(QUESTION) == prompt
    ids, length = parted(ours.encode(QUESTION, ANSWER))
    whole = own_ids(tokenizer, ("user", QUESTION), ("assistant", ANSWER), **family.kwargs)
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert ids == whole[: len(ids)]
    assert ids[:length] == prompt
    assert ids[length:].index(end) == len(ids) - length - 1
    assert whole[len(ids) :].count(end) == 0
    assert ours.ends(None) == sorted({end, tokenizer.eos_token_id})
    assert ours.ends([7, end]) == sorted({7, end, tokenizer.eos_token_id})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_learnt_is_read_back_as_it_was(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    ours = chat(tokenizer, template_kwargs=FAMILIES[name].kwargs)
    ids, length = parted(ours.encode(QUESTION, ANSWER))
    assert ours.answer(ids[length:-1]) == ANSWER


def test_what_leads_an_answer_in_is_not_part_of_it() -> None:
    thinking, channels = QWEN3.tokenizer(), CHANNELS.tokenizer()
    thought = "<think>\none and two\n</think>\n\nit is 3"
    assert chat(thinking).answer(thinking(thought)["input_ids"]) == ANSWER
    said = "<|channel|>analysis<|message|>one and two<|end|><|start|>assistant<|channel|>final<|message|>it is 3"
    assert chat(channels).answer(channels(said)["input_ids"]) == ANSWER
    assert chat(channels).answer(channels(ANSWER)["input_ids"]) == ANSWER


STOPS: dict[str, tuple[Family | None, str, tuple[str, ...], str]] = {
    "the first of several": (CHAT, "it is 3\nor 4. No", (".", "\n", "or"), "it is 3"),
    "the first that comes": (CHAT, "it is 3 or 3", ("3",), "it is"),
    "at once": (CHAT, "it is 3", ("i",), ""),
    "nowhere": (CHAT, "it is 3", ("\n", "three"), "it is 3"),
    "of a base model": (None, " it is 3\nQuestion: add", ("\nQuestion:",), "it is 3"),
    "not in a thought": (QWEN3, THOUGHT + "it is 3\nor 4", ("\n",), "it is 3"),
    "not in a thought that has words": (QWEN3, "<think>\none\n</think>\n\nit is 3\nor 4", ("\n",), "it is 3"),
    "not in the name of a channel": (CHANNELS, "<|channel|>final<|message|>the final 3", ("final",), "the"),
}


@pytest.mark.parametrize("name", STOPS)
def test_an_answer_is_cut_before_a_stop_text_and_what_leads_it_in_is_no_part_of_it(name: str) -> None:
    family, said, stop, answer = STOPS[name]
    tokenizer = family.tokenizer() if family else train_tokenizer()
    ids, ours = tokenizer(said)["input_ids"], chat(tokenizer)
    assert ours.answer(ids, stop) == answer
    stopped = [ours.is_stopped(ids[:length], stop) for length in range(1, len(ids) + 1)]
    assert any(stopped) == (answer != said)
    first = stopped.index(True) + 1 if any(stopped) else len(ids)
    assert ours.answer(ids[:first], stop) == answer  # and that is where generation ends


def test_stop_texts_are_looked_for_in_all_that_is_written_where_nothing_leads_answers_in() -> None:
    assert chat(CHAT.tokenizer()).stops(("\n", "3", "<|im_start|>")) == ["\n", "3"]
    assert chat(QWEN3.tokenizer()).stops(("\n", "3")) == ["3"]
    assert chat(CHANNELS.tokenizer()).stops(("final", "3", "<|message|>")) == ["3"]


@pytest.mark.parametrize(
    ("asked", "given", "learnt"),
    [
        (THOUGHT, "", "it is 3"),
        ("<think>\n", "", "\n</think>\n\nit is 3"),
        ("<think>\n", "<think></think>", "</think>it is 3"),
        (THOUGHT, "<think></think>", "it is 3"),
    ],
)
def test_an_answer_is_learnt_behind_the_prompt_though_the_template_writes_it_elsewhere(
    asked: str, given: str, learnt: str
) -> None:
    """It writes one thought, or none, before an answer given, and another before one asked for."""
    template = CHATML.replace("<|im_start|>assistant\n", "{{ '<|im_start|>assistant\n" + asked + "' }}").replace(
        "{{ message['content'] }}",
        "{% if loop.last and loop.index > 1 %}" + given + "{% endif %}{{ message['content'] }}",
    )
    tokenizer = Family(template, QWEN3.marks, end="<|im_end|>").tokenizer()
    ours = chat(tokenizer)
    ids, length = parted(ours.encode(QUESTION, ANSWER))
    assert ids[:length] == ours.prompt_ids(QUESTION)
    assert tokenizer.decode(ids[:length]).endswith(f"<|im_start|>assistant\n{asked}")
    assert tokenizer.decode(ids[length:]) == f"{learnt}<|im_end|>"
    assert ours.answer(ids[length:-1]) == ANSWER
    trimming = template.replace("['content'] }}", "['content'] | trim }}")
    trims = Family(trimming, QWEN3.marks, end="<|im_end|>").tokenizer()
    assert parted(chat(trims).encode(QUESTION, " it is 3\n")) == (ids, length)


def test_a_template_may_do_nothing_where_an_answer_begins() -> None:
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = Family(template, PHI.marks, end="<|end|>").tokenizer()
    ids, length = parted(chat(tokenizer).encode(QUESTION, ANSWER))
    assert tokenizer.decode(ids[length:]) == "<|assistant|>it is 3<|end|>"
    assert chat(tokenizer).answer(ids[length:-1]) == ANSWER


def test_a_turn_without_a_mark_at_its_end_ends_with_the_sequence() -> None:
    template = "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}### assistant:"
    tokenizer = Family(template, ("</s>",), end="</s>").tokenizer()
    ids, length = parted(chat(tokenizer).encode(QUESTION, ANSWER))
    assert tokenizer.decode(ids[:length]) == "### user\nadd one and two\n\n### assistant:"
    assert tokenizer.decode(ids[length:]) == "it is 3</s>"
    assert chat(tokenizer).ends(None) == [tokenizer.eos_token_id]


def test_a_blank_that_is_a_token_of_its_own_ends_nothing() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n\n<|im_end|>{% endfor %}"
    tokenizer = Family(template, ("<|im_start|>", "<|im_end|>", "\n\n"), end="<|im_end|>").tokenizer()
    ids, _ = parted(chat(tokenizer).encode(QUESTION, ANSWER))
    assert tokenizer.decode(ids).endswith("it is 3\n\n<|im_end|>")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM + CHATML, LEAVES_SYSTEM_OUT])
def test_a_system_prompt_goes_before_the_question_where_there_is_no_system_turn(template: str) -> None:
    tokenizer = Family(template, CHAT.marks, end=CHAT.end).tokenizer()
    ours = chat(tokenizer, system_prompt="Be brief.")
    both = "Be brief.\n\nadd one and two"
    assert ours.prompt_ids(QUESTION) == own_ids(tokenizer, ("user", both), add_generation_prompt=True)
    ids, _ = parted(ours.encode(QUESTION, ANSWER))
    assert ids == own_ids(tokenizer, ("user", both), ("assistant", ANSWER))[: len(ids)]


@pytest.mark.parametrize("family", [CHAT, LLAMA3, PHI])
def test_a_system_prompt_is_a_turn_where_there_is_one(family: Family) -> None:
    tokenizer = family.tokenizer()
    asked = own_ids(tokenizer, ("system", "Be brief."), ("user", QUESTION), add_generation_prompt=True)
    assert chat(tokenizer, system_prompt="Be brief.").prompt_ids(QUESTION) == asked


def test_a_base_model_gets_a_system_prompt_too() -> None:
    tokenizer = train_tokenizer()
    ids = chat(tokenizer, system_prompt="Be brief.").prompt_ids(QUESTION)
    assert tokenizer.decode(ids) == "Be brief.\n\nQuestion: add one and two\nAnswer:"


def test_the_date_is_the_same_on_any_day_and_can_be_set() -> None:
    for family in (LLAMA3, Family(TODAY, CHAT.marks, end=CHAT.end)):
        tokenizer = family.tokenizer()
        assert "26 Jul 2024" in tokenizer.decode(chat(tokenizer).prompt_ids(QUESTION))
        other = chat(tokenizer, template_date=date(2031, 2, 3))
        assert "03 Feb 2031" in tokenizer.decode(other.prompt_ids(QUESTION))
        assert "03 Feb 2031" in tokenizer.decode(other.encode(QUESTION, ANSWER).ids)
    tokenizer = LLAMA3.tokenizer()
    given = chat(tokenizer, template_kwargs={"date_string": "a Sunday"})
    assert "Today Date: a Sunday" in tokenizer.decode(given.prompt_ids(QUESTION))


def test_the_date_is_written_in_the_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {template_date: 2031-02-03, chat_template_kwargs: }")
    config = load_config(tmp_path / "config.yaml")
    assert config.model.template_date == date(2031, 2, 3)
    assert config.model.chat_template_kwargs == {}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert "template_date: '2024-07-26'" in dump_config(ExperimentConfig())
    (tmp_path / "config.yaml").write_text("model: {template_date: tomorrow}")
    with pytest.raises(ConfigError, match=r"model\.template_date"):
        load_config(tmp_path / "config.yaml")


def test_one_of_several_templates_is_chosen_by_its_name() -> None:
    tokenizer = CHAT.tokenizer()
    plain = chat(tokenizer).prompt_ids(QUESTION)
    tokenizer.chat_template = {"default": CHATML, "dated": TODAY}
    assert chat(tokenizer).prompt_ids(QUESTION) == plain
    dated = chat(tokenizer, template_kwargs={"chat_template": "dated"})
    assert "Today: 26 Jul 2024" in tokenizer.decode(dated.prompt_ids(QUESTION))
    tokenizer.chat_template = {"plain": CHATML, "dated": TODAY}
    with pytest.raises(ModelError, match=r"^model m: its chat template fails [^\n]*model\.chat_template_kwargs[^\n]*$"):
        chat(tokenizer)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('never') }}", r"^model m: its chat template fails \(never\); [^\n]*model\.name$"),
        ("{{ messages[0]['content'] + none }}", "its chat template fails"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "its chat template leaves the question out"),
        ("{{ messages[0]['content'] }}", "its chat template leaves the answer out"),
    ],
)
def test_a_template_that_does_not_do_is_refused(template: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        chat(Family(template, CHAT.marks, end=CHAT.end).tokenizer())


def test_a_tokenizer_without_an_end_of_sequence_is_refused() -> None:
    for template in (None, CHATML):
        with pytest.raises(ModelError, match="has no eos_token"):
            chat(train_tokenizer(eos=None, template=template))


# Base models ----------------------------------------------------------------------------------------------------------

BASE = {"marks": ("<pad>", "<s>", "</s>"), "eos": "</s>", "bos": "<s>"}


@pytest.mark.parametrize("spaces", ["bytes", "prepended"])
@pytest.mark.parametrize("frame", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_base_model_reads_and_learns_one_text_that_nothing_ends_but_its_end(frame: str | None, spaces: str) -> None:
    tokenizer = train_tokenizer(**BASE, frame=frame, spaces=spaces)  # type: ignore[arg-type]
    opening = [1] if frame and frame.startswith("<s>") else []
    text = "Question: add one and two\nAnswer:"
    prompt = [*opening, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    whole = [*opening, *tokenizer(f"{text} it is three", add_special_tokens=False)["input_ids"], 2]
    assert chat(tokenizer).prompt_ids(QUESTION) == prompt
    assert parted(chat(tokenizer).encode(QUESTION, "it is three")) == (whole, len(prompt))


def test_a_token_over_the_boundary_is_taken_apart_into_the_same_text() -> None:
    """"Answer: it" is one token here, which no prompt ends in the middle of."""
    tokenizer = train_tokenizer(**BASE, spaces="prepended", texts=("\nAnswer: it is three",) * 500)  # type: ignore[arg-type]
    together = tokenizer("\nAnswer: it", add_special_tokens=False)["input_ids"]
    assert together[-1] not in tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"]
    ours = chat(tokenizer)
    ids, length = parted(ours.encode(QUESTION, "it is three"))
    assert ids[:length] == ours.prompt_ids(QUESTION)
    assert tokenizer.decode(ids[:-1]) == "Question: add one and two\nAnswer: it is three"
    assert "".join(tokenizer.convert_ids_to_tokens(ids[length:])) == "▁it▁is▁three</s>"


# Conversations --------------------------------------------------------------------------------------------------------

TURNS = (("user", "add one"), ("assistant", "it is 2"), ("user", QUESTION), ("assistant", ANSWER))
IN_ONE_TEXT = ("ChatML", "Llama 3", "Gemma", "Phi", "Mistral")


def asked(*turns: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(role, content) for role, content in turns)  # type: ignore[arg-type]


@pytest.mark.parametrize("spaces", ["bytes", "prepended"])
@pytest.mark.parametrize("system", [(), (("system", "Be brief."),)])
@pytest.mark.parametrize("name", IN_ONE_TEXT)
def test_a_conversation_is_one_text_in_which_every_answer_is_learnt(
    name: str, system: tuple[tuple[str, str], ...], spaces: str
) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer(spaces=spaces)
    ours, prompt = chat(tokenizer), asked(*system, *TURNS[:-1])
    assert ours.parts(prompt, ANSWER) == [(prompt, ANSWER)]
    encoded = ours.encode(prompt, ANSWER)
    if system and name == "Gemma":  # which has no system turns: it goes before the first question
        (_, first), *others = TURNS
        own = (("user", f"Be brief.\n\n{first}"), *others)
    else:
        own = (*system, *TURNS)
    assert encoded.ids == own_ids(tokenizer, *own)[: len(encoded.ids)]
    assert ours.prompt_ids(prompt) == own_ids(tokenizer, *own[:-1], add_generation_prompt=True)
    end = tokenizer.convert_tokens_to_ids(family.end)
    learnt = [encoded.ids[begin:stop] for begin, stop in encoded.learnt]
    assert [ids[-1] for ids in learnt] == [end, end]
    assert [ours.answer(ids[:-1]) for ids in learnt] == ["it is 2", ANSWER]
    assert encoded.learnt[-1][1] == len(encoded.ids)
    assert (encoded.num_bytes, encoded.cut) == (len("it is 2") + len(ANSWER), "")
    begin = encoded.learnt[0][0]
    assert encoded.ids[:begin] == own_ids(tokenizer, *own[: len(own) - 3], add_generation_prompt=True)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in IN_ONE_TEXT])
def test_where_a_given_answer_is_written_otherwise_each_is_learnt_behind_its_own_prompt(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    ours, prompt = chat(tokenizer, template_kwargs=family.kwargs), asked(*TURNS[:-1])
    parts = ours.parts(prompt, ANSWER)
    assert parts == [(prompt[:1], "it is 2"), (prompt, ANSWER)]
    for part, turns in zip(parts, (TURNS[:1], TURNS[:3]), strict=True):
        ids, length = parted(ours.encode(*part))
        assert ids[:length] == own_ids(tokenizer, *turns, add_generation_prompt=True, **family.kwargs)
        assert ours.answer(ids[length:-1]) == part[1]


def test_a_base_model_reads_a_conversation_as_questions_and_answers() -> None:
    tokenizer = train_tokenizer()
    ours, prompt = chat(tokenizer, system_prompt="Be kind."), asked(("system", "Be brief."), *TURNS[:-1])
    parts = ours.parts(prompt, ANSWER)
    assert [tokenizer.decode(ours.encode(*part).ids[:-1]) for part in parts] == [
        "Be brief.\n\nQuestion: add one\nAnswer: it is 2",
        "Be brief.\n\nQuestion: add one\nAnswer: it is 2\n\nQuestion: add one and two\nAnswer: it is 3",
    ]
    assert tokenizer.decode(ours.prompt_ids(prompt[1:])).startswith("Be kind.\n\nQuestion: add one\nAnswer: it is 2\n")


def test_a_conversation_is_cut_by_whole_turns() -> None:
    tokenizer = CHAT.tokenizer()
    turns = asked(("system", "Be brief."), *TURNS[:2], *TURNS[:3])
    lengths = [len(chat(tokenizer).encode((turns[0], *turns[1 + 2 * n :]), ANSWER).ids) for n in range(3)]
    for lost in range(3):
        kept = (turns[0], *turns[1 + 2 * lost :])
        ours = chat(tokenizer, max_length=lengths[lost])
        encoded = ours.encode(turns, ANSWER)
        assert encoded.ids == chat(tokenizer).encode(kept, ANSWER).ids
        assert encoded.cut == ("turns" if lost else "")
        assert encoded.num_bytes == (2 - lost) * len("it is 2") + len(ANSWER)
    assert chat(tokenizer, max_length=lengths[2] - 1).encode(turns, ANSWER).cut == "prompt"
    prompts = [chat(tokenizer).prompt_ids((turns[0], *turns[1 + 2 * n :])) for n in range(3)]
    for lost in range(3):
        assert chat(tokenizer, max_length=len(prompts[lost])).prompt_ids(turns) == prompts[lost]
    assert chat(tokenizer, max_length=len(prompts[2]) - 1).prompt_ids(turns) == prompts[2][1:]


# Cut texts ------------------------------------------------------------------------------------------------------------


def test_cut_texts_are_counted() -> None:
    """Of 64 tokens at most 32 are a response's, with its end; a prompt has what is left."""
    tokenizer = train_tokenizer(texts=(" x",) * 500)
    ours = chat(tokenizer, max_length=64)

    def of(asked: int, answered: int) -> tuple[str, str]:
        overhead = len(chat(tokenizer).prompt_ids("")) - 1  # the last space of "Question: " begins the first word
        return "x" + " x" * (asked - overhead - 1), " ".join(["x"] * answered)

    lengths = [(50, 2), (61, 2), (62, 2), (32, 31), (33, 31), (32, 32), (32, 33), (33, 33)]
    examples = [of(*length) for length in lengths]
    for (asked, answered), example in zip(lengths, examples, strict=True):
        ids, prompt = parted(chat(tokenizer).encode(*example))
        assert (prompt, len(ids) - prompt) == (asked, answered + 1)
    cuts = [ours.encode(*example).cut for example in examples]
    assert cuts == ["", "", "prompt", "", "prompt", "end", "end", "end"]
    end = tokenizer.eos_token_id
    for example, cut in zip(examples, cuts, strict=True):
        ids, prompt = parted(ours.encode(*example))
        assert len(ids) <= 64
        assert (ids[-1] == end) == (cut != "end")
        if cut != "end":
            assert (ids[:prompt] == chat(tokenizer).encode(*example).ids[:prompt]) == (cut != "prompt")
            assert ours.encode(*example).num_bytes == len(example[1])
        else:
            assert ours.encode(*example).num_bytes == len(tokenizer.decode(ids[prompt:]))


# Models ---------------------------------------------------------------------------------------------------------------


def load(folder: Path, **settings: Any) -> LanguageModel:
    return LanguageModel(str(folder), lora=LoraConfig(), dtype="float32", device="cpu", max_length=64, **settings)


def test_an_answer_stops_at_the_end_of_its_turn_in_either_engine(tmp_path: Path) -> None:
    """The model's generation config names the end of sequence only, as that of some chat models does."""
    tokenizer = GEMMA.tokenizer()
    model = load(write_model(tmp_path, tokenizer=tokenizer))
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")

    def says_end(_: torch.nn.Module, __: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([end]), 1e9)

    model.model.get_output_embeddings().register_forward_hook(says_end)
    adapter, generation = model.fresh_adapter(), GenerationConfig(max_new_tokens=8)
    assert model.generate(adapter, [QUESTION], generation, np.random.default_rng(0)) == ([""], 1)
    request = model.engine_request(adapter, [QUESTION], generation, np.random.default_rng(0))
    assert request.ends == [tokenizer.eos_token_id, end]
    assert request.prompts == [own_ids(tokenizer, ("user", QUESTION), add_generation_prompt=True)]
    score = model.negative_log_likelihood(adapter, [Pair(QUESTION, ANSWER)], 1)
    assert score.num_bytes == (len(ANSWER),)
    assert score.num_tokens == (len(tokenizer(ANSWER)["input_ids"]) + 1,)


def test_a_model_s_format_needs_its_tokenizer_only(tmp_path: Path) -> None:
    WITHOUT_THOUGHT.tokenizer().save_pretrained(tmp_path / "thinks")
    train_tokenizer().save_pretrained(tmp_path / "base")
    folders = {name: tmp_path / name for name in ("thinks", "base")}
    kwargs = {"enable_thinking": False}
    formats = read_formats(folders, max_length=64, template_kwargs=kwargs)
    expected = chat(WITHOUT_THOUGHT.tokenizer(), template_kwargs=kwargs)
    assert formats["thinks"].encode(QUESTION, ANSWER) == expected.encode(QUESTION, ANSWER)
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs: enable_thought has no effect.*thinks, base"):
        read_formats(folders, max_length=64, template_kwargs={"enable_thought": False})
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs: enable_thinking has no effect.*base"):
        read_formats({"base": tmp_path / "base"}, max_length=64, template_kwargs=kwargs)
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs: chat_template has no effect.*base"):
        read_formats({"base": tmp_path / "base"}, max_length=64, template_kwargs={"chat_template": "rag"})
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs: messages cannot be chosen"):
        read_formats(folders, max_length=64, template_kwargs={"messages": []})
    with pytest.raises(ModelError, match="cannot load model none"):
        read_formats({"none": tmp_path}, max_length=64)


@pytest.mark.real
@pytest.mark.parametrize("key", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m"])
def test_ids_of_a_packaged_model_are_those_of_its_own_flow(key: str) -> None:
    try:
        locate(key)
    except ModelError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(f"packaged:{key}"))
    ids, length = parted(chat(tokenizer).encode("What is the capital of France?", "Paris, of course."))
    if tokenizer.chat_template is None:
        text = "Question: What is the capital of France?\nAnswer: Paris, of course."
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return
    turns = [("user", "What is the capital of France?"), ("assistant", "Paris, of course.")]
    assert ids == own_ids(tokenizer, *turns)[: len(ids)]
    assert ids[:length] == own_ids(tokenizer, turns[0], add_generation_prompt=True)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_texts_are_tokenized_once_and_what_is_remembered_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = chat_file._plain_ids
    monkeypatch.setattr(chat_file, "_plain_ids", lambda own, text: asked.append(text) or plain(own, text))
    format = chat(LLAMA3.tokenizer())
    conversation = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
    for prompt in ("one two", conversation):
        first = format.prompt_ids(prompt), format.encode(prompt, "two"), format.encode(prompt, "three")
        kept, count = [list(first[0]), *([*one.ids] for one in first[1:])], len(asked)
        first[0].append(0)
        first[1].ids.clear()
        again = format.prompt_ids(prompt), format.encode(prompt, "two"), format.encode(prompt, "three")
        assert [again[0], again[1].ids, again[2].ids] == kept
        assert again[2] == first[2]
        assert len(asked) == count
