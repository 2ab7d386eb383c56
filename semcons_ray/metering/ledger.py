"""The ledger of work: which process did what in which round, how long it took, and how many tokens and bytes it was.

A worker holds one `Ledger`, opens a stage around each piece of work, and hands its rows over after a visit. Energy is
not known then; `energy.apportion` fills it in when the round is over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from time import perf_counter, time
from types import TracebackType
from typing import Literal

import msgspec

Stage = Literal["load", "fine_tune", "generate", "encode", "embed", "consensus", "aggregate", "evaluate", "idle"]
Span = tuple[float, float]
"""Begin and end of a stretch of time, in seconds."""

EnergySource = Literal["measured", "estimated", "unavailable"]


class Place(msgspec.Struct, frozen=True):
    """Where a process computes.

    Attributes:
        node: Host name of the machine.
        gpus: UUIDs of the process's GPUs, separated by commas; empty: it computes on the CPU. They are those of whole
            GPUs, since only these have energy counters.
        sliced: Whether it has only a slice of one of them (MIG).
    """

    node: str
    gpus: str = ""
    sliced: bool = False

    @classmethod
    def of_all(cls, places: Sequence[Place]) -> Place:
        """The common place of several processes of one machine that work as one, such as ranks."""
        gpus = [gpu for place in places for gpu in split_gpus(place.gpus)]
        return cls(places[0].node, ",".join(dict.fromkeys(gpus)), any(place.sliced for place in places))


def split_gpus(gpus: str) -> list[str]:
    """The UUIDs in a `gpus` value; see `Place`."""
    return gpus.split(",") if gpus else []


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One piece of work; a row of ledger.parquet, columns in this order.

    Attributes:
        round: Round it was done for; 0 is set-up and the base evaluation.
        client_id: Client it was done for; -1 for the server, the driver, or a whole worker.
        worker: Process that did it: "worker-0", "server", "driver".
        node: Machine the process ran on.
        stage: Kind of work.
        started_at: Start by the node's own clock, unix seconds.
        duration_seconds: Length by a monotonic clock.
        tokens: Tokens trained on, generated or embedded.
        uplink_bytes: Encoded bytes from client to server (on generate rows, and on encode rows for weights).
        downlink_bytes: Encoded bytes from server to client (on fine_tune rows; public prompts on load rows).
        energy_joules: Energy; NaN while unavailable.
        energy_source: Whether `energy_joules` is measured, estimated or unavailable.
        gpus: UUIDs of the GPUs on which it was done; see `Place`.
        cost_usd: What was paid for it, in US dollars; 0 for work of one's own machines.
        note: What else is to be known of it, such as a cap that kept some of it from being done.
    """

    round: int
    client_id: int
    worker: str
    node: str
    stage: Stage
    started_at: float
    duration_seconds: float
    tokens: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    energy_joules: float = math.nan
    energy_source: EnergySource = "unavailable"
    gpus: str = ""
    cost_usd: float = 0.0
    note: str = ""


class Work:
    """A stage in progress: add to its counts inside the `with` block; its row is written when the block ends.

    `waited_seconds` is time in which another process did the work. That process has a row of its own for it, so it is
    subtracted here. `span` is its part of work that was done for several clients at once; None: all of it is its own.
    """

    __slots__ = ("_client_id", "_ledger", "_round", "_stage", "_start", "_started_at", "cost_usd", "downlink_bytes",
                 "note", "span", "tokens", "uplink_bytes", "waited_seconds")  # fmt: skip

    def __init__(self, ledger: Ledger, stage: Stage, round: int, client_id: int) -> None:
        self._ledger = ledger
        self._stage = stage
        self._round = round
        self._client_id = client_id
        self.tokens = 0
        self.uplink_bytes = 0
        self.downlink_bytes = 0
        self.cost_usd = 0.0
        self.note = ""
        self.waited_seconds = 0.0
        self.span: Span | None = None

    def __enter__(self) -> Work:
        self._started_at = time()
        self._start = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # No test of `error`: work that failed cost time and energy all the same, so its row is kept.
        duration = perf_counter() - self._start - self.waited_seconds
        started_at = self._started_at
        if self.span is not None:
            started_at, duration = self.span[0], self.span[1] - self.span[0]
        self._ledger.add(
            LedgerRow(
                round=self._round,
                client_id=self._client_id,
                worker=self._ledger.worker,
                node=self._ledger.node,
                stage=self._stage,
                started_at=started_at,
                duration_seconds=duration,
                tokens=self.tokens,
                uplink_bytes=self.uplink_bytes,
                downlink_bytes=self.downlink_bytes,
                gpus=self._ledger.gpus,
                cost_usd=self.cost_usd,
                note=self.note,
            )
        )


class Ledger:
    """The rows of one worker, kept until they are taken. One thread at a time may use it, and stages must not be
    nested, but for one that has a `span`."""

    def __init__(self, worker: str, node: str, gpus: str = "") -> None:
        self.worker = worker
        self.node = node
        self.gpus = gpus
        self._rows: list[LedgerRow] = []

    def stage(self, stage: Stage, *, round: int, client_id: int = -1) -> Work:
        """A context manager that times its block and writes one row, also when the block raises."""
        return Work(self, stage, round, client_id)

    def add(self, row: LedgerRow) -> None:
        """Append a finished row, for work whose length was measured elsewhere."""
        self._rows.append(row)

    def take(self, besides: Collection[int] = ()) -> list[LedgerRow]:
        """The rows since the last call, oldest first; only those of the clients `besides` stay in the ledger."""
        rows = [row for row in self._rows if row.client_id not in besides]
        self._rows = [row for row in self._rows if row.client_id in besides]
        return rows


def idle_rows(
    rows: Iterable[LedgerRow],
    round: int,
    window_start: float,
    window_end: float,
    workers: Mapping[str, Place] | None = None,
) -> list[LedgerRow]:
    """One idle row for each worker: the window less the union of the times when it was busy, in whatever round.

    An idle row starts at `window_start`, and its duration is a sum of gaps, not one stretch of time. The window is by
    the caller's clock and `rows` are by their nodes' clocks, so the result is off by as much as the clocks differ.

    Args:
        rows: Work of any workers; idle rows among it are ignored.
        round: Round written into the new rows.
        window_start: Start of the window, unix seconds.
        window_end: End of the window, unix seconds.
        workers: Place of each worker by name, for workers that may have no rows; those in `rows` are added.

    Returns:
        Rows in order of worker name.
    """
    places = dict(workers or {})
    spans: dict[str, list[tuple[float, float]]] = {worker: [] for worker in places}
    for row in rows:
        places.setdefault(row.worker, Place(row.node, row.gpus))
        busy = spans.setdefault(row.worker, [])
        if row.stage != "idle":
            start = max(row.started_at, window_start)
            end = min(row.started_at + row.duration_seconds, window_end)
            if end > start:
                busy.append((start, end))
    window = max(window_end - window_start, 0.0)
    return [
        LedgerRow(
            round=round,
            client_id=-1,
            worker=worker,
            node=places[worker].node,
            stage="idle",
            started_at=window_start,
            duration_seconds=max(window - sum(end - start for start, end in merged(spans[worker])), 0.0),
            gpus=places[worker].gpus,
        )
        for worker in sorted(spans)
    ]


def merged(spans: Sequence[Span], gap: float = 0.0) -> list[Span]:
    """The union of spans in order; spans no further than `gap` apart become one."""
    union: list[Span] = []
    for left, right in sorted(spans):
        if union and left - union[-1][1] <= gap:
            union[-1] = (union[-1][0], max(union[-1][1], right))
        else:
            union.append((left, right))
    return union
