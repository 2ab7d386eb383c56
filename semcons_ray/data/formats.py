"""The formats that data sets have in this field, recognised by their columns, and how a row of one becomes an example.

    prompt, response             texts; or lists of messages, as TRL's prompt, completion has them, too
    prompt, completion           TRL's prompt-completion: https://huggingface.co/docs/trl/dataset_formats
    instruction, output          Alpaca's; what `input` holds follows the instruction
    instruction, response        Dolly's; what `context` holds follows the instruction
    question, answer             of many benchmarks, GSM8K among them
    messages                     a conversation of {role, content}: OpenAI's and Hugging Face's
    conversations                the same of {from, value}: ShareGPT's

Beside these there may be category, options or choices (with the answer as one of them, its label or its number),
system, history (Alpaca's earlier questions with their answers), and client_id. `data.columns` says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from semcons_ray.config import Part
from semcons_ray.data.examples import Example
from semcons_ray.data.files import Row, Table
from semcons_ray.data.losses import NO_PROMPT, NO_RESPONSE, Reason
from semcons_ray.errors import DataError
from semcons_ray.messages import Prompt, Turn

PAIRS = {
    ("prompt", "response"): "columns",
    ("prompt", "completion"): "TRL's columns",
    ("instruction", "output"): "Alpaca's columns",
    ("instruction", "response"): "Dolly's columns",
    ("question", "answer"): "columns",
    ("question", "answerKey"): "columns",
}
"""Columns of a prompt and its response, with the name of such a format if it has one."""

CONVERSATIONS = {"messages": "columns", "conversations": "ShareGPT's columns"}
"""Columns of whole conversations."""

CONTEXTS = {"instruction": ("input", "context"), "question": ("context",)}
"""By column of the prompt, those of a text that follows it."""

OTHERS: Mapping[Part, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "category": ("category",),
    "options": ("options", "choices"),
    "client_id": ("client_id",),
}
"""Further columns, of either kind of format."""

Role = Literal["system", "user", "assistant"]

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}

_NOT_IN_TURN = Reason(
    words="whose turns are not user and assistant in turn", remedy="mend the conversations of data.source"
)
ONLY_ROLES = "give conversations of system, user and assistant turns of text in data.source"
_NO_OPTION = Reason(words="whose answer is none of its options", remedy="mend the options of data.source")

LEADING = Reason(words="answers to nothing, at the beginning", remedy="let conversations begin with a user's turn")
TRAILING = Reason(words="questions without an answer, at the end", remedy="let conversations end with an answer")


class LeftOutError(Exception):
    """A row cannot be used; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.words)
        self.reason = reason


@dataclass(frozen=True)
class Format:
    """How the rows of a table become examples.

    Attributes:
        name: What the format is called.
        columns: The column of each part of an example.
        unused: The table's other columns.
        needs_response: Whether a row without a response is left out.
        owner: The client that rows belong to that name none.
    """

    name: str
    columns: Mapping[Part, str]
    unused: tuple[str, ...]
    needs_response: bool
    owner: str

    def __str__(self) -> str:
        said = ", ".join(column if column == part else f"{column} as {part}" for part, column in self.columns.items())
        return f"{self.name} {said}" + (f"; not used: {', '.join(self.unused)}" if self.unused else "")

    def read(self, row: Row, dropped: Counter[Reason]) -> Example:
        """The example of a row.

        Args:
            row: A row of the table.
            dropped: Numbers of turns that are left out of conversations, by reason; counted up here.

        Raises:
            LeftOutError: The row cannot be used.
            DataError: A column is missing in it, or holds a value of a kind that it cannot have.
        """
        cut: Counter[Reason] = Counter()
        *asked, answer = self._turns(row, cut)
        response = answer.content
        options, labels = self._options(row)
        if options and response:
            response = _option(response, options, labels)
        if not all(turn.content for turn in asked if turn.role == "user"):
            raise LeftOutError(NO_PROMPT)
        if not all(turn.content for turn in asked) or (self.needs_response and not response):
            raise LeftOutError(NO_RESPONSE)
        dropped.update(cut)
        prompt: Prompt = asked[0].content if len(asked) == 1 else tuple(asked)
        category, owner = self._text(row, "category"), self._text(row, "client_id") or self.owner
        return Example(prompt, response, category, options, owner)

    def _turns(self, row: Row, dropped: Counter[Reason]) -> list[Turn]:
        """The conversation of a row: a system turn if there is one, then user and assistant in turn."""
        if "messages" in self.columns:
            said = _messages(row, self.columns["messages"])
        else:
            said = [*self._said(row, "prompt", "user"), *self._said(row, "response", "assistant")]
        said = [Turn("system", self._text(row, "system")), *self._history(row), *said]
        system = [turn.content for turn in said if turn.role == "system"]
        talk = [turn for turn in said if turn.role != "system"]
        if any(turn.role == "system" for turn in said[len(system) :]):
            raise LeftOutError(_NOT_IN_TURN)
        while talk and talk[0].role == "assistant":
            del talk[0]
            dropped[LEADING] += 1
        if talk and talk[-1].role == "user":
            if self.needs_response:
                del talk[-1]
                dropped[TRAILING] += 1
            else:
                talk.append(Turn("assistant", ""))
        if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(talk)):
            raise LeftOutError(_NOT_IN_TURN)
        if not talk:
            raise LeftOutError(NO_RESPONSE)
        joined = "\n\n".join(text for text in system if text)
        return [*([Turn("system", joined)] if joined else []), *talk]

    def _said(self, row: Row, part: Part, role: Role) -> list[Turn]:
        """The turns of a column that holds a text or, as TRL's may, messages."""
        if part not in self.columns:
            return []
        value = _unpacked(row.cells.get(self.columns[part]))
        if isinstance(value, list) and value and all(map(_is_message, value)):
            return _messages(row, self.columns[part])
        text = self._text(row, part)
        context = self._text(row, "context") if part == "prompt" else ""
        return [Turn(role, f"{text}\n\n{context}" if text and context else text)]

    def _history(self, row: Row) -> list[Turn]:
        column = self.columns.get("history")
        if column is None:
            return []
        turns = []
        for pair in _list(row, column, row.cells.get(column)):
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"{row.where}: {column} holds {pair!r:.40}, not a question with its answer")
            turns += [Turn("user", as_text(row, column, pair[0])), Turn("assistant", as_text(row, column, pair[1]))]
        return turns

    def _options(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Texts of the options, and their labels; both may be empty."""
        column = self.columns.get("options")
        if column is None:
            return (), ()
        value, labels = row.cells.get(column), None
        if isinstance(value, Mapping) and {"text", "label"} <= value.keys():  # as ARC and CommonsenseQA have them
            value, labels = value["text"], value["label"]
        texts, names = ([as_text(row, column, one) for one in _list(row, column, part)] for part in (value, labels))
        return tuple(texts), tuple(names)

    def _text(self, row: Row, part: Part) -> str:
        column = self.columns.get(part)
        if column is None:
            return ""
        if part in ("prompt", "response"):
            _check_there(row, column)
        return as_text(row, column, row.cells.get(column))


def recognise(table: Table, chosen: Mapping[Part, str | None], *, needs_response: bool = True) -> Format:
    """The format of a table, by the names of its columns.

    Args:
        table: The table.
        chosen: `data.columns`: the column of a part, or None for a part that is not to be read.
        needs_response: Whether an example needs a response; a public prompt does not.

    Raises:
        DataError: It is of no known format, or lacks a chosen column; the message says what to set.
    """
    there = table.columns
    listed = ", ".join(map(str, there)) or "no columns"
    for part, column in chosen.items():
        if column is not None and column not in there:
            raise DataError(f"data.columns says that {part} is {column}, and {table.name} has {listed}")
    columns: dict[Part, str] = {part: column for part, column in chosen.items() if column is not None}
    talk = next((column for column in CONVERSATIONS if column in there and "messages" not in chosen), None)
    if talk and not columns.keys() & {"messages", "prompt", "response"}:
        columns["messages"] = talk
    names: dict[Part, tuple[str, ...]] = dict(OTHERS)
    if "messages" not in columns:
        pair = _pair(columns, there, needs_response)
        if pair is None:
            raise DataError(
                f"{table.name} is of no known format: it has {listed}; say which is which with data.columns, as "
                f"{{prompt: {there[0] if there else 'question'}, response: {there[-1] if there else 'answer'}}}"
            )
        columns |= zip(("prompt", "response"), pair, strict=False)
        names |= {"context": CONTEXTS.get(pair[0], ()), "history": ("history",)}
    elif extra := columns.keys() & {"prompt", "response", "context", "history"}:
        raise DataError(f"data.columns gives messages and {', '.join(sorted(extra))}; leave one of both out")
    for part, known in names.items():
        found = next((name for name in known if name in there), None)
        if found and part not in chosen:
            columns[part] = found
    kind = CONVERSATIONS.get(columns.get("messages", "")) or PAIRS.get(
        (columns.get("prompt", ""), columns.get("response", "")), "columns"
    )
    unused = tuple(name for name in there if name not in columns.values())
    return Format(kind, columns, unused, needs_response, table.owner)


def _pair(chosen: Mapping[Part, str], there: Sequence[str], needs_response: bool) -> tuple[str, ...] | None:
    """The columns of prompt and response, or of the prompt alone where no response is needed; None if not known."""
    prompts, responses = ([chosen[part]] if part in chosen else None for part in ("prompt", "response"))
    if prompts or responses:  # any name goes with one that was chosen
        pairs = [
            (prompt, response)
            for prompt in prompts or dict.fromkeys(prompt for prompt, _ in PAIRS)
            for response in responses or dict.fromkeys(response for _, response in PAIRS)
        ]
    else:
        pairs = [*PAIRS]
    singles = [] if needs_response else [(prompt,) for prompt, _ in pairs]
    return next((pair for pair in [*pairs, *dict.fromkeys(singles)] if set(pair) <= set(there)), None)


def all_names(chosen: Mapping[Part, str | None]) -> set[str]:
    """Names of all columns that `recognise` may use, with these `chosen`."""
    names = {*CONVERSATIONS, "history", *(column for column in chosen.values() if column)}
    return names.union(*PAIRS, *CONTEXTS.values(), *OTHERS.values())


def as_text(row: Row, column: str, value: Any) -> str:
    """A cell as text, without white space at its ends.

    Raises:
        DataError: It is neither text nor a number, or holds what is no character.
    """
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float, np.floating, Decimal)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column} is {value!r:.40} ({type(value).__name__}), not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer or file takes it
        raise DataError(f"{row.where}: {column} holds {value[error.start]!r}, which is no character") from error
    return value.strip()


def _check_there(row: Row, column: str) -> None:
    if column not in row.cells:
        raise DataError(f"{row.where} has no {column}; it has {', '.join(row.cells) or 'nothing'}")


def _messages(row: Row, column: str) -> list[Turn]:
    _check_there(row, column)
    turns = []
    for message in _list(row, column, row.cells[column]):
        if not _is_message(message):
            raise DataError(f"{row.where}: {column} holds {message!r:.40}, not a message with role and content")
        said = str(message.get("role", message.get("from"))).lower()
        role = ROLES.get(said)
        if role is None:
            raise LeftOutError(Reason(words=f"with a turn of role {said:.20}", remedy=ONLY_ROLES))
        turns.append(Turn(role, _content(row, column, message.get("content", message.get("value")))))
    return turns


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.keys() & {"role", "from"})


def _content(row: Row, column: str, content: Any) -> str:
    """The text of a message, which may be given in parts."""
    if not isinstance(content, list):
        return as_text(row, column, content)
    if any(not isinstance(part, Mapping) or part.get("type", "text") != "text" for part in content):
        raise LeftOutError(Reason(words="with a turn that is not text alone", remedy=ONLY_ROLES))
    return "".join(as_text(row, column, part.get("text")) for part in content)


def _unpacked(value: Any) -> Any:
    """A list that a CSV file has to hold as text, as JSON; any other value unchanged."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _list(row: Row, column: str, value: Any) -> list[Any]:
    value = _unpacked(value)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise DataError(f"{row.where}: {column} is {value!r:.40} ({type(value).__name__}), not a list")
    return value


def _option(response: str, options: Sequence[str], labels: Sequence[str]) -> str:
    """The option that a response stands for: by its label, its text, its number from 0, or its letter."""
    letters = string.ascii_uppercase[: len(options)]
    if response in labels:
        return options[labels.index(response)]
    if response in options:
        return response
    if response.isdigit() and int(response) < len(options):
        return options[int(response)]
    if response in letters:
        return options[letters.index(response)]
    raise LeftOutError(_NO_OPTION)
