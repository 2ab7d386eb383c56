"""How questions and answers are written for a model family: from texts to token ids, and back.

A chat model's tokenizer has a chat template. The prompt is what `apply_chat_template` makes of the question, with the
generation prompt at its end. What is learnt and scored after it is the rest of the conversation as the template writes
it, up to the token that ends the assistant's turn (<|eot_id|>, <end_of_turn>, </s> ...), which need not be the
tokenizer's end of sequence. A base model, which has no template, is asked "Question: ...\\nAnswer:".

Only the tokenizer is needed, so a model's prompts can be checked without its weights.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, Protocol

from semcons_ray.config import TEMPLATE_DATE
from semcons_ray.errors import ConfigError, ModelError, first_line
from semcons_ray.messages import Prompt, Turn, turns_of

SYSTEM, QUESTION, ANSWER = "mandatum", "quaestio", "responsum"
"""Words that occur in no template: where they appear in a rendered conversation shows where a template puts texts."""

ANCHORS = ("a", ".", "\n")
REMEMBERED = 4096
"""How many prompts, and how many texts that are learnt or scored, are remembered as ids: public prompts are asked of
each client anew, and their labels learnt."""
SET_HERE = ("messages", "add_generation_prompt", "strftime_now")
"""Variables of a template that users cannot set."""


_OPEN_THOUGHT = re.compile(r"<(think|thinking|thought)>\s*$")

Cut = Literal["", "turns", "prompt", "end"]
"""What a text loses to `max_length`: nothing, its first turns, its prompt's beginning, or its response's end: the end
of turn and perhaps words, so that the model is not taught to end there."""


@dataclass(frozen=True)
class Encoded:
    """A text as token ids.

    Attributes:
        ids: The ids.
        learnt: Where its responses with their ends are: for each, the first place and the one after the last.
        num_bytes: Length of the responses' text as UTF-8, which does not depend on the tokenizer.
        cut: What it has lost.
    """

    ids: list[int]
    learnt: tuple[tuple[int, int], ...]
    num_bytes: int
    cut: Cut = ""


class Style(Protocol):
    """How questions and answers are written as text.

    Attributes:
        opening: Ids before every text.
        closing: Ids after an answer whose text holds no end.
        end: Id that ends an answer.
        lead: What the template puts before answers by itself, such as an empty thought, without special tokens.
    """

    opening: list[int]
    closing: list[int]
    end: int
    lead: str

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation that ends in a question, up to where the answer begins."""
        ...

    def rest(self, prompt: str, turns: Sequence[Turn], response: str) -> str:
        """The text that follows `prompt`, the prompt of these turns, if the answer is `response`."""
        ...

    def written(self, ids: Sequence[int]) -> str:
        """The text of an answer that a model has generated as these ids, without what the template puts before
        answers."""
        ...

    def is_leading(self, ids: Sequence[int]) -> bool:
        """Whether a model that has generated these ids is still at what the template puts before answers."""
        ...

    def shown(self, text: str) -> str:
        """What of that text is the answer: without the space around it, and what the template puts before an end."""
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
        added = {str(entry.content): token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        self._special = added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._style: Style = _PlainStyle(tokenizer, system_prompt)
        if tokenizer.chat_template:
            kwargs = {**(template_kwargs or {}), "strftime_now": datetime.combine(template_date, time()).strftime}
            self._style = _TemplateStyle(tokenizer, name, system_prompt, kwargs)
        # Four bytes an id, where a list of int takes 36.
        self._remembered_prompt = lru_cache(REMEMBERED)(lambda prompt: array("i", self._prompt_ids(prompt)))
        self._remembered = lru_cache(REMEMBERED)(self._compact)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids that the model is given to answer a prompt, cut to `max_length`: first by whole turns."""
        return [*self._remembered_prompt(prompt)]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        for turns in _shortened(turns_of(prompt)):
            ids = self._ids(self._style.prompt(turns))
            if len(ids) <= self._max_length:
                return ids
        return self._shortened_prompt(ids, self._max_length)

    def parts(self, prompt: Prompt, response: str) -> list[tuple[Prompt, str]]:
        """The prompts and responses to learn of a conversation: one, which has all its answers, or one for each.

        There is one for each answer where the template writes an answer that has been given otherwise than it asks for
        one, as many do that leave past thoughts out, or where nothing ends it but the end of the text.
        """
        if isinstance(prompt, str):
            return [(prompt, response)]
        turns = (*prompt, Turn("assistant", response))
        pieces = self._pieces(turns)
        if self._is_one_text(pieces):
            return [(prompt, response)]
        return [(turns[:place], turns[place].content) for place, _, _ in pieces]

    def encode(self, prompt: Prompt, response: str) -> Encoded:
        """Ids of a part of a conversation (see `parts`), cut to `max_length`: first by whole turns."""
        ids, learnt, num_bytes, cut = self._remembered(prompt, response)
        return Encoded([*ids], learnt, num_bytes, cut)

    def _compact(self, prompt: Prompt, response: str) -> tuple[array[int], tuple[tuple[int, int], ...], int, Cut]:
        found = self._encode(prompt, response)
        return array("i", found.ids), found.learnt, found.num_bytes, found.cut

    def _encode(self, prompt: Prompt, response: str) -> Encoded:
        lost: Cut = ""
        for turns in _shortened(turns_of(prompt)):
            ids, answers = self._whole(turns, response)
            if len(ids) <= self._max_length:
                num_bytes = sum(len(text.encode()) for _, _, text in answers)
                return Encoded(ids, tuple((begin, end) for begin, end, _ in answers), num_bytes, lost)
            lost = "turns"
        ((begin, _, text),) = answers
        answer, lost = ids[begin:], "prompt"
        if len(answer) > self._max_length // 2:  # it loses its end: it isn't taught to end there
            answer, lost = answer[: self._max_length // 2], "end"
            text = self._tokenizer.decode(answer)
        asked = self._shortened_prompt(ids[:begin], self._max_length - len(answer))
        return Encoded([*asked, *answer], ((len(asked), len(asked) + len(answer)),), len(text.encode()), lost)

    def option(self, prompt: Prompt, option: str) -> Encoded:
        """Ids of a prompt with an option as its answer, of which the option's are scored as by lm-eval (0.4.13).

        Unlike an answer, an option is scored without the end of its turn. It follows the prompt, with a space between
        them where there is no chat template, and white space at the end of the prompt is scored with it.

        It is cut to `max_length` at its beginning; an option gets at most half of it.
        """
        asked = self._style.prompt(turns_of(prompt))
        between = "" if self._tokenizer.chat_template else " "
        ids, begin = self._ids(asked + between + option), len(self._ids(asked.rstrip()))
        scored = ids[begin:][: self._max_length // 2]
        before = self._shortened_prompt(ids[:begin], self._max_length - len(scored))
        return Encoded([*before, *scored], ((len(before), len(before) + len(scored)),), len(option.encode()))

    def ends(self, configured: int | Sequence[int] | None) -> list[int]:
        """Ids that end an answer: the end of turn, the end of sequence, and those of the model's generation config.

        Args:
            configured: `eos_token_id` of the generation config.
        """
        listed = configured if isinstance(configured, Sequence) else [configured]
        known = {self._style.end, self._tokenizer.eos_token_id, *listed}
        return sorted(known - {None})

    def marks(self, stop: Sequence[str]) -> list[int]:
        """Ids of those of the texts at which an answer ends that are special tokens, which no answer's text shows."""
        return [self._special[word] for word in stop if word in self._special]

    def answer(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of an answer that a model has generated, without its end and what the template puts before answers.

        Args:
            ids: Its tokens, without the one that ended it.
            stop: Texts before which it is cut.
        """
        text = self._style.written(ids)
        places = [text.find(word) for word in stop]
        return self._style.shown(text[: min((place for place in places if place >= 0), default=None)])

    def is_stopped(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether an answer, generated as far as these ids, holds one of the texts at which it ends.

        What the template puts before answers is no part of one.
        """
        text = self._style.written(ids) if stop and not self._style.is_leading(ids) else ""
        return any(word in text for word in stop)

    def stops(self, stop: Sequence[str]) -> list[str]:
        """Those of the texts at which an answer ends that can be looked for in all that a model writes.

        Others are special tokens, or also in what the template puts before answers.
        """
        return [word for word in stop if word not in self._style.lead and word not in self._special]

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[int, str, str]]:
        """For each answer of a conversation its place, its prompt, and the text that follows it there."""
        pieces = []
        for place, turn in enumerate(turns):
            if turn.role == "assistant":
                prompt = self._style.prompt(turns[:place])
                pieces.append((place, prompt, self._style.rest(prompt, turns[:place], turn.content)))
        return pieces

    def _is_one_text(self, pieces: Sequence[tuple[int, str, str]]) -> bool:
        """Whether each answer, as it is learnt, stands in the prompt of the next."""
        following = itertools.pairwise(pieces)
        return not self._style.closing and all(
            after.startswith(prompt + rest) for (_, prompt, rest), (_, after, _) in following
        )

    def _whole(self, turns: Sequence[Turn], response: str) -> tuple[list[int], list[tuple[int, int, str]]]:
        """Ids of a conversation with the answer to it, before cutting; and each of its answers that is learnt: where it
        begins, where it ends, and its text."""
        every = (*turns, Turn("assistant", response))
        pieces = self._pieces(every)
        if not self._is_one_text(pieces):
            pieces = pieces[-1:]
        ids, text, answers = list[int](), "", list[tuple[int, int, str]]()
        for place, prompt, rest in pieces:
            ids = [*ids, *self._following(text, ids, prompt[len(text) :])] if ids else self._ids(prompt)
            answer = [*self._following(prompt, ids, rest), *self._style.closing]
            answers.append((len(ids), len(ids) + len(answer), every[place].content))
            ids, text = [*ids, *answer], prompt + rest
        return ids, answers

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

    def _shortened_prompt(self, prompt: list[int], length: int) -> list[int]:
        """The last `length` ids of a prompt that is too long; a beginning-of-sequence token is kept."""
        if len(prompt) <= length:
            return prompt
        kept = 1 if prompt[0] == self._tokenizer.bos_token_id else 0
        return prompt[:kept] + prompt[len(prompt) - length + kept :]


class _PlainStyle:
    """The style of a base model."""

    lead = ""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        plain, whole = _plain_ids(tokenizer, QUESTION), list(tokenizer(QUESTION)["input_ids"])
        places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        # What a tokenizer puts before every text belongs to a prompt; what it puts after one would end it.
        self.opening = whole[: places[0]] if places else []
        self.end: int = tokenizer.eos_token_id
        self.closing = [self.end]

    def prompt(self, turns: Sequence[Turn]) -> str:
        system, talk = _system_and_talk(turns, self._system_prompt)
        asked = [f"{'Question' if turn.role == 'user' else 'Answer'}: {turn.content}" for turn in talk]
        pairs = ["\n".join(asked[place : place + 2]) for place in range(0, len(asked), 2)]
        return "\n\n".join([*([system] if system else []), *pairs]) + "\nAnswer:"

    def rest(self, prompt: str, turns: Sequence[Turn], response: str) -> str:
        return f" {response}"

    def written(self, ids: Sequence[int]) -> str:
        return _plain_text(self._tokenizer, ids)

    def is_leading(self, ids: Sequence[int]) -> bool:
        return False

    def shown(self, text: str) -> str:
        return text.strip()


class _TemplateStyle:
    """The style of a model with a chat template."""

    def __init__(self, tokenizer: Any, name: str, system_prompt: str, kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._system_prompt = system_prompt
        self._kwargs = kwargs
        asked = (Turn("user", QUESTION),)
        self._has_system_turn = self._shows_system_turns()
        prompt, whole = self.prompt(asked), self._conversation(asked, ANSWER)
        shown = (("question", QUESTION, prompt), ("question", QUESTION, whole), ("answer", ANSWER, whole))
        for kind, word, text in shown:
            if word not in text:
                raise ModelError(f"model {name}: its chat template leaves the {kind} out; choose another model.name")
        beginning, _, self._after = whole.rpartition(ANSWER)
        self._lead = _lead(prompt, beginning)
        marks = _marks_in(self._lead, tokenizer)
        self._lead_end: int | None = None
        self._lead_marks = {token for token, _ in marks}
        mark = ""
        if marks:
            self._lead_end, mark = marks[-1]
        self._lead_tail = self._lead.rpartition(mark)[2] if marks else self._lead
        self.lead = _plain_text(tokenizer, _plain_ids(tokenizer, self._lead))
        ends = _marks_in(self._after, tokenizer)
        self.opening: list[int] = []
        self.end: int = tokenizer.eos_token_id
        self.closing = [self.end]
        self._before_end = self._ending = ""  # without a mark, nothing but the end of sequence can end a turn
        if ends:
            (self.end, mark), self.closing = ends[0], []
            self._before_end = self._after.partition(mark)[0]
            self._ending = self._before_end + mark

    def prompt(self, turns: Sequence[Turn]) -> str:
        return self._rendered(self._messages(turns), add_generation_prompt=True)

    def rest(self, prompt: str, turns: Sequence[Turn], response: str) -> str:
        whole = self._conversation(turns, response)
        if whole.startswith(prompt) and whole.endswith(self._after):
            return whole[len(prompt) : len(whole) - len(self._after)] + self._ending
        # The template writes an answer in a conversation otherwise than it asks for one, for example without the empty
        # thought that its generation prompt has. The answer is learnt behind the prompt, where it will be asked for.
        shown = response if response + self._after in whole else response.strip()
        return self._lead + shown + self._ending

    def written(self, ids: Sequence[int]) -> str:
        text = _plain_text(self._tokenizer, ids[self._after_lead_end(ids) :])
        words, space = self._lead_tail.strip(), self._lead_tail[len(self._lead_tail.rstrip()) :]
        if words and text.lstrip().startswith(words):
            text = text.lstrip()[len(words) :]
        return text.removeprefix(space)

    def is_leading(self, ids: Sequence[int]) -> bool:
        begin = self._after_lead_end(ids)
        lead = self._lead_tail if begin else self.lead
        in_words = not begin and not self._lead_marks.isdisjoint(ids)
        return in_words or lead.startswith(_plain_text(self._tokenizer, ids[begin:]))

    def shown(self, text: str) -> str:
        return text.strip().removesuffix(self._before_end.strip()).strip()

    def _after_lead_end(self, ids: Sequence[int]) -> int:
        return max((place + 1 for place, token in enumerate(ids) if token == self._lead_end), default=0)

    def _shows_system_turns(self) -> bool:
        """Whether the template writes system turns; some refuse them, and some leave them out."""
        turns = [Turn("system", SYSTEM), Turn("user", QUESTION), Turn("assistant", ANSWER)]
        try:
            return SYSTEM in self._rendered([turn._asdict() for turn in turns])
        except ModelError:
            return False

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        system, talk = _system_and_talk(turns, self._system_prompt)
        if system and self._has_system_turn:
            talk = [Turn("system", system), *talk]
        elif system:
            talk = [Turn("user", f"{system}\n\n{talk[0].content}"), *talk[1:]]
        return [turn._asdict() for turn in talk]

    def _conversation(self, turns: Sequence[Turn], response: str) -> str:
        return self._rendered([*self._messages(turns), {"role": "assistant", "content": response}])

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


def _system_and_talk(turns: Sequence[Turn], system_prompt: str) -> tuple[str, list[Turn]]:
    """The system turn's text, which is `system_prompt` where there is no such turn, and the other turns."""
    if turns[0].role == "system":
        return turns[0].content, [*turns[1:]]
    return system_prompt, [*turns]


def _shortened(turns: tuple[Turn, ...]) -> Iterator[tuple[Turn, ...]]:
    """A conversation that ends in a question, and the same without its first question and answer, and so on."""
    begin = 1 if turns[0].role == "system" else 0
    for dropped in range(0, len(turns) - begin, 2):
        yield (*turns[:begin], *turns[begin + dropped :])


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


def _plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _marks_in(text: str, tokenizer: Any) -> list[tuple[int, str]]:
    """Special and added tokens in a text, with their texts: those that are tokens whatever stands around them."""
    added = {token: str(entry.content) for token, entry in tokenizer.added_tokens_decoder.items()}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    marks = added | special
    found = [(token, marks[token]) for token in _plain_ids(tokenizer, text) if token in marks]
    return [(token, mark) for token, mark in found if mark.strip() and mark in text]
