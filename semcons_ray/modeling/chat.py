"""How a model family writes a question and its answer: from texts to token ids, and back.

A family's tokenizer brings its own way: a chat template. A question is what `apply_chat_template` makes of it, with the
prompt for an answer behind it; what is learnt and scored after it is the rest of the conversation as the template
writes it, up to the token that ends the assistant's turn (<|eot_id|>, <end_of_turn>, </s> ...), which need not be the
tokenizer's end of sequence. A base model, without a template, is asked "Question: ...\\nAnswer:".

Only the tokenizer is needed, so the same ids can be had without the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from os.path import commonprefix
from pathlib import Path
from typing import Any, Protocol

from semcons_ray.config import TEMPLATE_DATE
from semcons_ray.errors import ConfigError, ModelError, first_line

QUESTION, ANSWER = "quaestio", "responsum"
"""Words that no template holds, to see in a conversation of them where it puts what."""

ANCHORS = ("a", ".", "\n")
SET_HERE = ("messages", "add_generation_prompt", "strftime_now")
"""Variables of a template that are not the user's to choose."""


_OPEN_THOUGHT = re.compile(r"<(think|thinking|thought)>\s*$")


@dataclass(frozen=True)
class CutTexts:
    """How many texts `max_length` cuts, none counted twice.

    Attributes:
        prompts: Those of which only the prompt loses tokens, at its beginning.
        ends: Those whose response loses its end of turn, and perhaps some of what it says: it is not taught to end.
    """

    prompts: int
    ends: int


class Style(Protocol):
    """How questions and answers are written as text.

    Attributes:
        opening: Ids before every text.
        closing: Ids after an answer whose text holds no end.
        end: Id that ends an answer.
    """

    opening: list[int]
    closing: list[int]
    end: int

    def prompt(self, question: str) -> str:
        """A question, up to where the answer begins."""
        ...

    def rest(self, prompt: str, question: str, response: str) -> str:
        """What follows `prompt`, that of the question, when the answer is `response`."""
        ...

    def said(self, ids: Sequence[int]) -> str:
        """The answer that was written in these ids, in so far as its end has been left out."""
        ...


class ChatFormat:
    """Prompts, responses and ends of turns as token ids.

    Args:
        tokenizer: A tokenizer of transformers.
        name: Of the model, for errors.
        max_length: Tokens a prompt with its response is cut to; a response gets half of them at most.
        system_prompt: Goes first; before the question, where a template takes no system turn. Empty leaves it out.
        template_kwargs: Passed to the chat template.
        template_date: The day that a chat template is told is today.

    Raises:
        ModelError: The tokenizer has no end of sequence, or its chat template refuses or drops a question or an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str,
        max_length: int,
        system_prompt: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
        template_date: date = TEMPLATE_DATE,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"model {name}: its tokenizer has no eos_token, so nothing says where an answer ends; set it in its "
                "tokenizer_config.json, or choose another model.name"
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._style: Style = _PlainStyle(tokenizer, system_prompt)
        if tokenizer.chat_template:
            kwargs = {**(template_kwargs or {}), "strftime_now": datetime.combine(template_date, time()).strftime}
            self._style = _TemplateStyle(tokenizer, name, system_prompt, kwargs)

    def prompt_ids(self, question: str) -> list[int]:
        """What the model is given to answer a question, cut to `max_length`."""
        return self._cut(self._ids(self._style.prompt(question)), self._max_length)

    def encode(self, question: str, response: str) -> tuple[list[int], int]:
        """Ids of a question and its answer, cut to `max_length`, and how many of them are the prompt's."""
        prompt, answer = self._whole(question, response)
        answer = answer[: self._max_length // 2]  # cut, it isn't taught to end there
        prompt = self._cut(prompt, self._max_length - len(answer))
        return [*prompt, *answer], len(prompt)

    def ends(self, configured: int | Sequence[int] | None) -> list[int]:
        """Ids that end an answer: what ends a turn, a sequence, and what a generation config names."""
        listed = configured if isinstance(configured, Sequence) else [configured]
        known = {self._style.end, self._tokenizer.eos_token_id, *listed}
        return sorted(known - {None})

    def ends_turn(self, ids: Sequence[int]) -> bool:
        """Whether a response that `encode` gave has its end still."""
        return ids[-1] == self._style.end

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer that a model has written, without its end and without what led it in."""
        return self._style.said(ids)

    def count_cut(self, examples: Iterable[tuple[str, str]]) -> CutTexts:
        """How many of these questions and responses `encode` cuts."""
        half = self._max_length // 2
        lengths = [(len(prompt), len(answer)) for prompt, answer in (self._whole(*example) for example in examples)]
        return CutTexts(
            prompts=sum(answer <= half and prompt + answer > self._max_length for prompt, answer in lengths),
            ends=sum(answer > half for _, answer in lengths),
        )

    def _whole(self, question: str, response: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of what follows it with the end."""
        text = self._style.prompt(question)
        prompt = self._ids(text)
        rest = self._style.rest(text, question, response)
        return prompt, [*self._following(text, prompt, rest), *self._style.closing]

    def _following(self, text: str, ids: list[int], rest: str) -> list[int]:
        """Ids of `rest` behind `text`, which has `ids`: those of both together, from where `text` ends."""
        together = self._ids(text + rest)
        if together[: len(ids)] == ids:
            return together[len(ids) :]
        # A token reaches over the boundary, where a model that answers can't have one: so `rest` gets the ids that it
        # has behind a character that it doesn't grow together with. By itself it could get a space before it.
        for anchor in ANCHORS:
            before, both = _plain_ids(self._tokenizer, anchor), _plain_ids(self._tokenizer, anchor + rest)
            if both[: len(before)] == before:
                return both[len(before) :]
        return _plain_ids(self._tokenizer, rest)

    def _ids(self, text: str) -> list[int]:
        return [*self._style.opening, *_plain_ids(self._tokenizer, text)]

    def _cut(self, prompt: list[int], length: int) -> list[int]:
        """The end of a prompt too long; a first token that marks the beginning of every text stays before it."""
        if len(prompt) <= length:
            return prompt
        kept = 1 if prompt[0] == self._tokenizer.bos_token_id else 0
        return prompt[:kept] + prompt[len(prompt) - length + kept :]


class _PlainStyle:
    """That of a base model."""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self._tokenizer = tokenizer
        self._before = f"{system_prompt}\n\n" if system_prompt else ""
        plain, whole = _plain_ids(tokenizer, QUESTION), list(tokenizer(QUESTION)["input_ids"])
        places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        # What a tokenizer puts before every text belongs to a prompt; what it puts after one would end it.
        self.opening = whole[: places[0]] if places else []
        self.end: int = tokenizer.eos_token_id
        self.closing = [self.end]

    def prompt(self, question: str) -> str:
        return f"{self._before}Question: {question}\nAnswer:"

    def rest(self, prompt: str, question: str, response: str) -> str:
        return f" {response}"

    def said(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _TemplateStyle:
    """That of a chat template."""

    def __init__(self, tokenizer: Any, name: str, system_prompt: str, kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._system_prompt = system_prompt
        self._kwargs = kwargs
        self._has_system_turn = bool(system_prompt)
        if system_prompt and not self._shows_system_prompt():
            self._has_system_turn = False
        prompt, whole = self.prompt(QUESTION), self._conversation(QUESTION, ANSWER)
        shown = (("question", QUESTION, prompt), ("question", QUESTION, whole), ("answer", ANSWER, whole))
        for kind, word, text in shown:
            if word not in text:
                raise ModelError(f"model {name}: its chat template leaves the {kind} out; choose another model.name")
        beginning, _, self._after = whole.rpartition(ANSWER)
        self._lead = _lead(prompt, beginning)
        marks = _marks_in(self._lead, tokenizer)
        self._lead_end: int | None = None
        mark = ""
        if marks:
            self._lead_end, mark = marks[-1]
        self._lead_text = (self._lead.rpartition(mark)[2] if marks else self._lead).strip()
        ends = _marks_in(self._after, tokenizer)
        self.opening: list[int] = []
        self.end: int = tokenizer.eos_token_id
        self.closing = [self.end]
        self._before_end = self._ending = ""  # without a mark, nothing but the end of sequence can end a turn
        if ends:
            (self.end, mark), self.closing = ends[0], []
            self._before_end = self._after.partition(mark)[0]
            self._ending = self._before_end + mark

    def prompt(self, question: str) -> str:
        return self._rendered(self._turns(question), add_generation_prompt=True)

    def rest(self, prompt: str, question: str, response: str) -> str:
        whole = self._conversation(question, response)
        if whole.startswith(prompt) and whole.endswith(self._after):
            return whole[len(prompt) : len(whole) - len(self._after)] + self._ending
        # An answer given is written otherwise than one is asked for, say without the empty thought that stands in the
        # prompt: it is learnt where it is asked for.
        shown = response if response + self._after in whole else response.strip()
        return self._lead + shown + self._ending

    def said(self, ids: Sequence[int]) -> str:
        begin = max((place + 1 for place, token in enumerate(ids) if token == self._lead_end), default=0)
        text = str(self._tokenizer.decode(ids[begin:], skip_special_tokens=True)).strip()
        return text.removeprefix(self._lead_text).removesuffix(self._before_end.strip()).strip()

    def _shows_system_prompt(self) -> bool:
        """Whether the template writes a system turn; some refuse one, and some leave it out."""
        try:
            return self._system_prompt.strip() in self._conversation(QUESTION, ANSWER)
        except ModelError:
            return False

    def _turns(self, question: str) -> list[dict[str, str]]:
        if self._has_system_turn:
            return [{"role": "system", "content": self._system_prompt}, {"role": "user", "content": question}]
        before = f"{self._system_prompt}\n\n" if self._system_prompt else ""
        return [{"role": "user", "content": before + question}]

    def _conversation(self, question: str, response: str) -> str:
        return self._rendered([*self._turns(question), {"role": "assistant", "content": response}])

    def _rendered(self, turns: list[dict[str, str]], **options: bool) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options, **self._kwargs))
        except Exception as error:  # templates are programs; what goes wrong in one, the user must see to
            raise ModelError(
                f"model {self._name}: its chat template fails ({first_line(error)}); set model.chat_template_kwargs, "
                "or choose another model.name"
            ) from error


def read_formats(
    folders: Mapping[str, Path],
    *,
    max_length: int,
    system_prompt: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
    template_date: date = TEMPLATE_DATE,
) -> dict[str, ChatFormat]:
    """The format of each model, by its name, from the tokenizer in its folder.

    Raises:
        ConfigError: A name in `template_kwargs` is one that no model's chat template reads.
        ModelError: A tokenizer cannot be loaded; and see `ChatFormat`.
    """
    tokenizers = {name: load_tokenizer(name, folder) for name, folder in folders.items()}
    _check_kwargs(template_kwargs or {}, tokenizers)
    return {
        name: ChatFormat(
            tokenizer,
            name=name,
            max_length=max_length,
            system_prompt=system_prompt,
            template_kwargs=template_kwargs,
            template_date=template_date,
        )
        for name, tokenizer in tokenizers.items()
    }


def load_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a model, by its folder.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        raise ModelError(f"cannot load model {name}: its tokenizer: {first_line(error)}") from error


def _check_kwargs(kwargs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> None:
    texts = [str(tokenizer.chat_template) for tokenizer in tokenizers.values() if tokenizer.chat_template]
    for key in kwargs:
        if key in SET_HERE:
            raise ConfigError(f"model.chat_template_kwargs: {key} cannot be chosen; leave it out")
        if not any(key == "chat_template" or re.search(rf"\b{re.escape(key)}\b", text) for text in texts):
            raise ConfigError(
                f"model.chat_template_kwargs: {key} has no effect: no chat template of {', '.join(tokenizers)} reads it"
            )


def _lead(prompt: str, beginning: str) -> str:
    """What an answer begins with before it says anything, such as an empty thought or the name of a channel.

    Args:
        prompt: A question as it is asked.
        beginning: A conversation with the same question, up to what its answer says.
    """
    same = len(commonprefix([prompt, beginning]))  # noqa: RUF071 - of texts, letter by letter
    asked, given = prompt[same:], beginning[same:]
    if not asked.strip():
        return given
    thought = _OPEN_THOUGHT.search(asked)
    # Families that leave thoughts out of answers given open one where they ask: it is to be closed before the answer.
    return f"\n</{thought[1]}>\n\n" if thought else ""


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _marks_in(text: str, tokenizer: Any) -> list[tuple[int, str]]:
    """Tokens in a text that stand by themselves whatever is around them, but for the blanks that some families add."""
    added = {token: str(entry.content) for token, entry in tokenizer.added_tokens_decoder.items()}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    marks = added | special
    found = [(token, marks[token]) for token in _plain_ids(tokenizer, text) if token in marks]
    return [(token, mark) for token, mark in found if mark.strip() and mark in text]
