"""What a visit asks of a client's device and link, as the ledger has it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from semcons_ray.metering.ledger import LedgerRow

BYTES_PER_TOKEN = 4.0
"""Bytes of a text for each of its tokens; see `api.cost.ENCODING_BYTES`."""

TOKENS_PER_WORD = 1.3
"""Tokens of a sentence-embedding model for each word; the ledger's rows of the stage embed count words."""


class Visit(NamedTuple):
    """A client's part of a round.

    Attributes:
        client_id: The client.
        round: The round in which it was asked.
        downlink_bytes: What it is sent, before it begins.
        trained_tokens: Tokens that it trains on.
        prompt_tokens: Tokens of prompts that it reads to answer them.
        generated_tokens: Tokens of its answers.
        uplink_bytes: What it sends, when it is done.
    """

    client_id: int
    round: int
    downlink_bytes: int
    trained_tokens: int
    prompt_tokens: int
    generated_tokens: int
    uplink_bytes: int


class Visits:
    """The visits of each round, from rows of the ledger. Measurements of models are left out.

    Args:
        ledger: The rows; those of the server and the driver are ignored.
        prompt_tokens: Tokens of all public prompts together, which whoever answers them reads.
        weights: By how much messages with weights are longer, where another model is imagined.
    """

    def __init__(self, ledger: pd.DataFrame, prompt_tokens: int, weights: float = 1.0) -> None:
        own = ledger[(ledger["client_id"] >= 0) & (ledger["round"] > 0) & ~ledger["stage"].isin(["evaluate", "idle"])]
        learns, answers, encodes = (own["stage"] == stage for stage in ("fine_tune", "generate", "encode"))
        table = pd.DataFrame(
            {
                "downlink_bytes": own["downlink_bytes"].where(~learns, own["downlink_bytes"] * weights),
                "trained_tokens": own["tokens"].where(learns, 0),
                "prompt_tokens": answers.astype("int64"),
                "generated_tokens": own["tokens"].where(answers, 0),
                "uplink_bytes": own["uplink_bytes"].where(~encodes, own["uplink_bytes"] * weights),
            }
        )
        sums = table.groupby([own["client_id"], own["round"]]).sum().round().astype("int64").reset_index()
        # Once, though the client's worker and the engine that answers for it have a row each.
        sums["prompt_tokens"] = (sums["prompt_tokens"] > 0) * prompt_tokens
        self._table = sums.sort_values(["round", "client_id"])

    def __getitem__(self, round: int) -> list[Visit]:
        """The visits of a round, by client id."""
        first, last = (int(self._table["round"].searchsorted(round, side=side)) for side in ("left", "right"))
        return [Visit(*row) for row in self._table.iloc[first:last].itertuples(index=False, name=None)]


def ledger_table(rows: Iterable[LedgerRow]) -> pd.DataFrame:
    """What `visits_of` and `server_work` need of a ledger's rows."""
    columns = ("round", "client_id", "stage", "tokens", "uplink_bytes", "downlink_bytes")
    return pd.DataFrame([[getattr(row, name) for name in columns] for row in rows], columns=[*columns])


def tokens_of(texts: Iterable[str]) -> int:
    """About how many tokens these texts have."""
    return math.ceil(sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN)


class ServerWork(NamedTuple):
    """What the server does after a round.

    Attributes:
        embedded_tokens: Tokens that its sentence-embedding model reads.
        received_bytes: Bytes of the messages that it aggregates or elects from.
    """

    embedded_tokens: int
    received_bytes: int


def server_work(ledger: pd.DataFrame, weights: float = 1.0) -> ServerWork:
    """The server's work of a round, from the ledger's rows of it; see `visits_of`."""
    words = ledger.loc[ledger["stage"] == "embed", "tokens"].sum()
    received = ledger["uplink_bytes"].where(ledger["stage"] != "encode", ledger["uplink_bytes"] * weights).sum()
    return ServerWork(math.ceil(words * TOKENS_PER_WORD), round(received))
