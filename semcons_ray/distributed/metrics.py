"""A run's metrics for Prometheus, listed in `METRICS`, by Ray's exporter on the driver's node.

They have the same numbers as the ledger. Progress is exported as clients answer, everything else as each round is
committed. Without a Ray cluster nothing is exported.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

from semcons_ray.metering.ledger import LedgerRow

METRICS: dict[str, tuple[type[Counter] | type[Gauge], str, tuple[str, ...]]] = {
    "semcons_num_rounds": (Gauge, "Rounds of the run", ()),
    "semcons_round": (Gauge, "Round in progress; 0 measures the base model", ()),
    "semcons_round_clients_asked": (Gauge, "Clients to visit in the round in progress", ()),
    "semcons_round_clients_answered": (Gauge, "Clients that have answered in the round in progress", ()),
    "semcons_rounds_committed": (Counter, "Rounds committed, the base model's too", ()),
    "semcons_clients_lost": (Counter, "Clients left out of a round", ()),
    "semcons_uplink_bytes": (Counter, "Encoded bytes from clients to the server", ()),
    "semcons_downlink_bytes": (Counter, "Encoded bytes from the server to clients", ()),
    "semcons_tokens": (Counter, "Tokens trained on, generated or embedded", ("stage",)),
    "semcons_seconds": (Counter, "Seconds of work or idleness, over all processes", ("stage",)),
    "semcons_cost_usd": (Counter, "US dollars paid for work done elsewhere", ("stage",)),
    "semcons_energy_joules": (Counter, "Energy", ("stage", "source")),
    "semcons_test_bits_per_byte": (Gauge, "Mean over clients that tell it of the test set's bits per byte", ()),
    "semcons_test_nll": (Gauge, "The same in nats a token, of runs whose clients all have one model", ()),
    "semcons_agreement": (Gauge, "Mean agreement over public prompts in the last round", ()),
}
"""By name: kind, meaning, and labels besides `run`. Prometheus sees ray_NAME, and counters as ray_NAME_total."""


REPEAT_SECONDS = 1.0


class RunMetrics:
    """Exports a run's metrics from `start` to `stop`; a thread sets the gauges again and again, since Ray drops stale
    ones.

    Args:
        run: The label that tells runs apart. Ray accepts ASCII only, so any other name is percent-encoded, as in a URL.
        num_rounds: Rounds of the run.
    """

    def __init__(self, run: str, num_rounds: int) -> None:
        label = run if run.isascii() else quote(run, errors="surrogateescape")
        self._metrics = {
            name: kind(name, help_text, tag_keys=("run", *labels)).set_default_tags({"run": label})
            for name, (kind, help_text, labels) in METRICS.items()
        }
        self._gauges: dict[str, float] = {"semcons_num_rounds": num_rounds}
        self._stop = threading.Event()
        self._repeater = threading.Thread(target=self._repeat, name="metrics", daemon=True)

    def start(self) -> None:
        """Begin to export."""
        self._repeater.start()

    def stop(self) -> None:
        """Export no more."""
        self._stop.set()
        self._repeater.join()

    def round_begins(self, round: int, num_clients: int) -> None:
        """Clients are being visited."""
        self._gauges |= {
            "semcons_round": round,
            "semcons_round_clients_asked": num_clients,
            "semcons_round_clients_answered": 0,
        }

    def client_answered(self) -> None:
        """A client was visited."""
        self._gauges["semcons_round_clients_answered"] += 1

    def round_committed(
        self, rows: Iterable[LedgerRow], *, num_lost: int, bits_per_byte: float, nll: float, agreement: float
    ) -> None:
        """A round was committed.

        Args:
            rows: Its ledger rows.
            num_lost: Number of clients left out of it.
            bits_per_byte: Mean over clients; NaN if it was not measured in this round.
            nll: Mean over clients, nats a token; NaN if it was not measured, or clients have several models.
            agreement: Mean over prompts; NaN if no consensus was formed.
        """
        sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for row in rows:
            stage = ("stage", row.stage)
            sums["semcons_uplink_bytes", ()] += row.uplink_bytes
            sums["semcons_downlink_bytes", ()] += row.downlink_bytes
            sums["semcons_tokens", (stage,)] += row.tokens
            sums["semcons_seconds", (stage,)] += row.duration_seconds
            sums["semcons_cost_usd", (stage,)] += row.cost_usd
            if row.energy_source != "unavailable":
                sums["semcons_energy_joules", (stage, ("source", row.energy_source))] += row.energy_joules
        sums["semcons_clients_lost", ()] += num_lost
        sums["semcons_rounds_committed", ()] += 1
        for (name, labels), value in sums.items():
            if value > 0:  # Ray refuses to add nothing
                self._metrics[name].inc(value, tags=dict(labels))
        measured = {
            "semcons_test_bits_per_byte": bits_per_byte,
            "semcons_test_nll": nll,
            "semcons_agreement": agreement,
        }
        self._gauges |= {name: value for name, value in measured.items() if not math.isnan(value)}

    def _repeat(self) -> None:
        while not self._stop.wait(REPEAT_SECONDS):
            for name, value in list(self._gauges.items()):
                self._metrics[name].set(value)
