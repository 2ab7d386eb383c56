"""How questions and answers are written for a model family: from texts to token ids, and back.

A chat model's tokenizer has a chat template. The prompt is what `apply_chat_template` makes of the question, with the
generation prompt at its end. What is learnt and scored after it is the rest of the conversation as the template writes
it, up to the token that ends the assistant's turn (<|eot_id|>, <end_of_turn>, </s> ...), which need not be the
tokenizer's end of sequence. A base model, which has no template, is asked "Question: ...\\nAnswer:".

Only the tokenizer is needed, so a model's prompts can be checked without its weights.
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
"""Words that occur in no template: where they appear in a rendered conversation shows where a template puts texts."""

ANCHORS = ("a", ".", "\n")
SET_HERE = ("messages", "add_generation_prompt", "strftime_now")
"""Variables of a template that users cannot set."""


_OPEN_THOUGHT = re.compile(r"<(think|thinking|thought)>\s*$")


@dataclass(frozen=True)
class CutTexts:
    """How many texts are cut at `max_length`; none is counted twice.

    Attributes:
        prompts: Texts of which only the prompt loses tokens, at its beginning.
        ends: Texts whose response loses its end: the end of turn, and perhaps words. The model is not taught to end
            there.
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
        """The text of a question, up to where the answer begins."""
        ...

    def rest(self, prompt: str, question: str, response: str) -> str:
        """The text that follows `prompt`, the prompt of this question, if the answer is `response`."""
        ...

    def said(self, ids: Sequence[int]) -> str:
        """The text of an answer that a model has generated as these ids, without the token that ended it."""
        ...


class ChatFormat:
    """Prompts, responses and ends of turns as token ids.

    Args:
        tokenizer: A tokenizer of transformers.
        name: Name of the model, for errors.
        max_length: Most tokens of a prompt with its response; the response gets at most half of them.
        system_prompt: Text of a system turn; where a template takes none, it goes before the question. Empty: none.
        template_kwargs: Arguments for the chat template.
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
        """Ids that the model is given to answer a question, cut to `max_length`."""
        return self._cut(self._ids(self._style.prompt(question)), self._max_length)

    def encode(self, question: str, response: str) -> tuple[list[int], int]:
        """Ids of a question and its answer, cut to `max_length`, and how many of them are the prompt's."""
        prompt, answer = self._whole(question, response)
        answer = answer[: self._max_length // 2]  # an answer that is cut loses its end: it isn't taught to end there
        prompt = self._cut(prompt, self._max_length - len(answer))
        return [*prompt, *answer], len(prompt)

    def ends(self, configured: int | Sequence[int] | None) -> list[int]:
        """Ids that end an answer: the end of turn, the end of sequence, and those of the model's generation config.

        Args:
            configured: `eos_token_id` of the generation config.
        """
        listed = configured if isinstance(configured, Sequence) else [configured]
        known = {self._style.end, self._tokenizer.eos_token_id, *listed}
        return sorted(known - {None})

    def ends_turn(self, ids: Sequence[int]) -> bool:
        """Whether the ids of a response that `encode` gave still have their end."""
        return ids[-1] == self._style.end

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer that a model has generated, without its end and what the template puts before
        answers."""
        return self._style.said(ids)

    def count_cut(self, examples: Iterable[tuple[str, str]]) -> CutTexts:
        """How many of these (question, response) pairs `encode` cuts."""
        half = self._max_length // 2
        lengths = [(len(prompt), len(answer)) for prompt, answer in (self._whole(*example) for example in examples)]
        return CutTexts(
            prompts=sum(answer <= half and prompt + answer > self._max_length for prompt, answer in lengths),
            ends=sum(answer > half for _, answer in lengths),
        )

    def _whole(self, question: str, response: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of the response with its end, before cutting."""
        text = self._style.prompt(question)
        prompt = self._ids(text)
        rest = self._style.rest(text, question, response)
        return prompt, [*self._following(text, prompt, rest), *self._style.closing]

    def _following(self, text: str, ids: list[int], rest: str) -> list[int]:
        """Ids of `rest` as they follow `ids`, those of `text`, when both texts are tokenized together."""
        together = self._ids(text + rest)
        if together[: len(ids)] == ids:
            return together[len(ids) :]
        # A token crosses the boundary, which cannot happen when a model generates. So `rest` gets the ids that it has
        # behind a character with which it doesn't merge; tokenized alone, it could get a space before it.
        for anchor in ANCHORS:
            before, both = _plain_ids(self._tokenizer, anchor), _plain_ids(self._tokenizer, anchor + rest)
            if both[: len(before)] == before:
                return both[len(before) :]
        return _plain_ids(self._tokenizer, rest)

    def _ids(self, text: str) -> list[int]:
        return [*self._style.opening, *_plain_ids(self._tokenizer, text)]

    def _cut(self, prompt: list[int], length: int) -> list[int]:
        """The last `length` ids of a prompt that is too long; a beginning-of-sequence token is kept."""
        if len(prompt) <= length:
            return prompt
        kept = 1 if prompt[0] == self._tokenizer.bos_token_id else 0
        return prompt[:kept] + prompt[len(prompt) - length + kept :]


class _PlainStyle:
    """The style of a base model."""

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
    """The style of a model with a chat template."""

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
        # The template writes an answer in a conversation otherwise than it asks for one, for example without the empty
        # thought that its generation prompt has. The answer is learnt behind the prompt, where it will be asked for.
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
    """The chat format of each model by name, from the tokenizer in the model's folder; see `ChatFormat` for the rest.

    Raises:
        ConfigError: No model's chat template reads one of `template_kwargs`, or it cannot be set.
        ModelError: A tokenizer cannot be loaded, or does not do for a `ChatFormat`.
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
    """Load the tokenizer of the model `name` from its folder.

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
    """What the template puts before the words of an answer, such as an empty thought or the name of a channel.

    Args:
        prompt: A question with the generation prompt.
        beginning: A conversation with the same question, up to the words of its answer.
    """
    same = len(commonprefix([prompt, beginning]))  # noqa: RUF071 - of texts, letter by letter
    asked, given = prompt[same:], beginning[same:]
    if not asked.strip():
        return given
    thought = _OPEN_THOUGHT.search(asked)
    # Some templates leave thoughts out of past answers but open one in the generation prompt: it must be closed first.
    return f"\n</{thought[1]}>\n\n" if thought else ""


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _marks_in(text: str, tokenizer: Any) -> list[tuple[int, str]]:
    """Special and added tokens in a text, with their texts: those that are tokens whatever stands around them."""
    added = {token: str(entry.content) for token, entry in tokenizer.added_tokens_decoder.items()}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    marks = added | special
    found = [(token, marks[token]) for token in _plain_ids(tokenizer, text) if token in marks]
    return [(token, mark) for token, mark in found if mark.strip() and mark in text]
