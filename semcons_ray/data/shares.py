"""Examples in columns, of which one is made when it is asked for: so that a million clients are a table and a list of
places in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from semcons_ray.data.examples import Example
from semcons_ray.messages import Turn, text_of

COLUMNS = (
    pa.field("prompt", pa.string()),
    pa.field("response", pa.string()),
    pa.field("category", pa.string()),
    pa.field("turns", pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))),
    pa.field("options", pa.list_(pa.string())),
    pa.field("owner", pa.string()),
)
"""Of an example. The prompt is there as one text, and, if it is a conversation, as its turns."""


def to_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The values of `COLUMNS` by name."""
    columns = {name: [getattr(one, name) for one in examples] for name in ("response", "category", "options", "owner")}
    prompts = [example.prompt for example in examples]
    columns["prompt"] = [text_of(prompt) for prompt in prompts]
    columns["turns"] = [[] if isinstance(prompt, str) else [turn._asdict() for turn in prompt] for prompt in prompts]
    return columns


def to_examples(table: pa.Table) -> tuple[Example, ...]:
    """The examples in the rows of a table that has `COLUMNS`."""
    values = [table.column(field.name).to_pylist() for field in COLUMNS]
    return tuple(
        Example(tuple(Turn(**turn) for turn in turns) or text, response, category, tuple(options), owner)
        for text, response, category, turns, options, owner in zip(*values, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Shares(Sequence[tuple[Example, ...]]):
    """The examples of each client, by client id. It is sent to other processes without a copy of the texts.

    Attributes:
        table: All clients' examples, those of a client in a row, in the order of client ids, with `COLUMNS`.
        ends: Row after the last of each client, (C,).
    """

    table: pa.Table
    ends: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of examples of each client, (C,)."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        """Number C of clients."""
        return len(self.ends)

    @overload
    def __getitem__(self, client_id: int, /) -> tuple[Example, ...]: ...

    @overload
    def __getitem__(self, client_id: slice, /) -> tuple[tuple[Example, ...], ...]: ...

    def __getitem__(self, client_id: int | slice, /) -> tuple[Example, ...] | tuple[tuple[Example, ...], ...]:
        """The examples of a client."""
        if isinstance(client_id, slice):
            return tuple(self[client] for client in range(*client_id.indices(len(self))))
        if not -len(self) <= client_id < len(self):
            raise IndexError(f"there are {len(self)} clients, and {client_id} is none of them")
        client = client_id % len(self)
        start = int(self.ends[client - 1]) if client else 0
        return to_examples(self.table.slice(start, int(self.ends[client]) - start))

    def __eq__(self, other: object) -> bool:
        """Whether all clients have the same examples, in whichever sequence."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
