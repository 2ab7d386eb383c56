"""Rounds over real links: Ray nodes in network namespaces; measured, and predicted from the ledger and the link's rate.

    python experiments/network/run.py [--parts PART ...] [--out DIR] [--runs DIR]

own         two clients with a link each, of 1, 5 and 20 Mbit/s, after a calibration of plain calls at 5 Mbit/s.
shared      four clients that share the head's link of 1, 5 and 20 Mbit/s.
shared_bbr  at 5 Mbit/s, where TCP avoids congestion by BBR, which does not share evenly at once, and not by Reno.

Needs root, iproute2 and the kernel's tbf. Each client is a Ray node in a namespace of its own; driver and server are on
the head. Writes rounds.csv, a row for each round; settings.csv, means of the rounds that are predicted;
calibration.json; and rounds.svg. Parts that were measured there before stay.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from links import Counters, Network
from matplotlib.figure import Figure as Canvas
from nodes import Cluster
from prediction import Link, Visit, round_seconds
from workload import ROUNDS, write_config

from semcons_ray.metering.environment import describe_environment
from semcons_ray.reporting.drawing import BLUE, INK, ORANGE, log_axis, place_legend, save

HERE = Path(__file__).parent
ALGORITHMS = {"semantic_consensus": BLUE, "fedavg_lora": ORANGE}
CALIBRATION_MBIT, CALIBRATION_BYTES, REPETITIONS = 5.0, 2_000_000, 3
IDLE_SECONDS = 20.0
STEADY = range(2, ROUNDS)
"""Rounds in which messages go both ways and nobody is measured on a test set."""


@dataclass(frozen=True)
class Part:
    """Settings that are measured on one cluster.

    Attributes:
        clients: Number of clients.
        shared: Whether they share the head's link.
        mbits: Rates of the links, in turn.
        congestion: TCP's congestion control.
        marker: Its marker in the figure.
    """

    clients: int
    shared: bool
    mbits: tuple[float, ...]
    congestion: str
    marker: str


PARTS = {
    "own": Part(2, False, (1.0, 5.0, 20.0), "bbr", "o"),
    "shared": Part(4, True, (1.0, 5.0, 20.0), "reno", "s"),
    "shared_bbr": Part(4, True, (5.0,), "bbr", "x"),
}


def calibrate(cluster: Cluster, network: Network) -> dict[str, Any]:
    """What plain calls at one rate say of a link: how much of it messages get, and how long a call takes without any.

    Traffic that Ray has without a call is measured by itself, and taken from the rate.
    """
    network.limit(CALIBRATION_MBIT)
    with Counters(network) as counters:
        began = time.time()
        time.sleep(IDLE_SECONDS)
        background = sum(counters.between(began, time.time())) / 2 / len(network.clients) / IDLE_SECONDS
    script = (str(HERE / "transfers.py"), cluster.address, str(CALIBRATION_BYTES), str(REPETITIONS))
    taken: dict[str, list[float]] = json.loads(cluster.run(*script).splitlines()[-1])
    empty, down, up = (statistics.median(taken[name]) for name in ("empty", "down", "up"))
    return {
        "mbit": CALIBRATION_MBIT,
        "bytes": CALIBRATION_BYTES,
        "seconds": taken,
        "background_bytes_per_second": background,
        "efficiency": CALIBRATION_BYTES / ((down + up) / 2 - empty) / (CALIBRATION_MBIT * 1e6 / 8 - background),
        "call_seconds": empty,
    }


def calibrated(calibration: Mapping[str, Any], *, shared: bool) -> Link:
    """A link by what `calibrate` returned, at its rate."""
    names = ("mbit", "efficiency", "call_seconds", "background_bytes_per_second")
    return Link(shared=shared, **{name: calibration[name] for name in names})


def measure(cluster: Cluster, network: Network, link: Link, algorithm: str, part: str, folder: Path) -> pd.DataFrame:
    """A run over links as `link` says: a row for each round, as measured and, where it is steady, as predicted."""
    network.limit(link.mbit)
    num_clients = len(network.clients)
    out = folder / f"{part}_{link.mbit:g}_{algorithm}"
    config = write_config(folder, algorithm, num_clients)
    command = ("-m", "semcons_ray.commands.cli", "run", str(config), "--out", str(out))
    with Counters(network) as counters:
        began = time.time()
        cluster.run(*command, "--resources.ray_address", cluster.address)
    rounds, ledger = (pd.read_parquet(out / f"{table}.parquet").set_index("round") for table in ("rounds", "ledger"))
    rows = []
    for number, (start, seconds) in rounds[["started_at", "duration_seconds"]].iterrows():
        visits, conclude_seconds = of_round(ledger.loc[[number]], num_clients)
        span = (start, start + seconds) if number else (began, rounds.loc[1, "started_at"])
        down, up = counters.between(*span)
        rows.append(
            {
                "part": part,
                "algorithm": algorithm,
                "clients": num_clients,
                "mbit": link.mbit,
                "round": number,
                "measured_seconds": span[1] - span[0],
                "predicted_seconds": round_seconds(visits, link, conclude_seconds) if number in STEADY else None,
                "without_link_seconds": round_seconds(visits, replace(link, mbit=float("inf")), conclude_seconds),
                "down_bytes": sum(visit.down_bytes for visit in visits),
                "up_bytes": sum(visit.up_bytes for visit in visits),
                "wire_down_bytes": down,
                "wire_up_bytes": up,
            }
        )
    return pd.DataFrame(rows)


def of_round(ledger: pd.DataFrame, num_clients: int) -> tuple[list[Visit], float]:
    """The visits of a round, and how long the server worked when all messages were there.

    The server's rows don't tell whose answers were embedded, so each client gets the mean. Public prompts are left out:
    they are counted at a client's first visit, but sent when models are loaded.

    Args:
        ledger: Its rows.
        num_clients: How many clients took part, with ids from 0 on.
    """
    seconds = ledger.groupby("stage")["duration_seconds"].sum()
    collect_seconds = seconds.get("embed", 0.0) / num_clients
    work = ledger[ledger["stage"] != "load"].groupby("client_id").sum(numeric_only=True)
    work = work.reindex(range(num_clients), fill_value=0)
    visits = [
        Visit(row.downlink_bytes, row.duration_seconds, row.uplink_bytes, collect_seconds) for row in work.itertuples()
    ]
    return visits, seconds.get("consensus", 0.0) + seconds.get("aggregate", 0.0)


def summarize(rounds: pd.DataFrame) -> pd.DataFrame:
    """Means over the steady rounds of each setting, and by how much the prediction is off: of the round, and of the
    part of it in which the link is busy."""
    steady = rounds.dropna(subset="predicted_seconds")
    table = steady.groupby(["part", "algorithm", "clients", "mbit"], sort=False).mean().drop(columns="round")
    error = table["predicted_seconds"] - table["measured_seconds"]
    table.insert(2, "error", error / table["measured_seconds"])
    table.insert(3, "error_of_link", error / (table["measured_seconds"] - table["without_link_seconds"]))
    each = steady["predicted_seconds"] / steady["measured_seconds"] - 1
    table.insert(4, "worst_round", each.abs().groupby([steady[key] for key in table.index.names], sort=False).max())
    return table.reset_index()


def draw(rounds: pd.DataFrame, path: Path) -> None:
    """Measured over predicted seconds of each steady round, between lines that are 10% off."""

    def on(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for algorithm, color in ALGORITHMS.items():
            own = rounds[rounds["algorithm"] == algorithm].dropna(subset="predicted_seconds")
            for name, part in PARTS.items():
                rows = own[own["part"] == name]
                label = f"{algorithm}, {name}"
                axes.plot(rows["predicted_seconds"], rows["measured_seconds"], part.marker, color=color, label=label)
        span = [rounds["predicted_seconds"].min() / 1.3, rounds["predicted_seconds"].max() * 1.3]
        for factor, style in ((1.0, "-"), (1.1, ":"), (0.9, ":")):
            axes.plot(span, [factor * end for end in span], style, color=INK, linewidth=0.8)
        log_axis(axes, "x", "s")
        log_axis(axes, "y", "s")
        axes.set_xlabel("predicted seconds of a round (dotted: 10% off)")
        axes.set_ylabel("measured")
        place_legend(canvas, axes, 1)

    save(path, on, (6.4, 4.8))


@contextmanager
def cluster_of(part: Part) -> Iterator[tuple[Cluster, Network]]:
    """A cluster on a network, and the network; both are gone after the block."""
    network = Network(part.clients, shared=part.shared, congestion=part.congestion)
    with network, tempfile.TemporaryDirectory(prefix="net-", dir="/tmp") as place:
        yield Cluster(network, Path(place)), network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="Folder for what is written.")
    parser.add_argument("--runs", type=Path, help="New folder that keeps the runs; default: they are not kept.")
    args = parser.parse_args()
    if os.geteuid():
        parser.error("network namespaces need root")
    file, table = args.out / "calibration.json", args.out / "rounds.csv"
    if "own" not in args.parts and not file.is_file():
        parser.error(f"{file} is not there yet: measure part own first")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # namespaces and nodes go on the way out
    args.out.mkdir(parents=True, exist_ok=True)
    parts = dict([*pd.read_csv(table).groupby("part")]) if table.is_file() else {}
    with tempfile.TemporaryDirectory() as beside:
        folder = args.runs or Path(beside)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.parts:
            part, measured = PARTS[name], []
            with cluster_of(part) as (cluster, network):
                if name == "own":
                    calibration = calibrate(cluster, network) | {"environment": describe_environment()}
                    file.write_text(json.dumps(calibration, indent=2) + "\n", encoding="utf-8")
                link = calibrated(json.loads(file.read_text(encoding="utf-8")), shared=part.shared)
                for mbit in part.mbits:
                    for algorithm in ALGORITHMS:
                        measured.append(measure(cluster, network, replace(link, mbit=mbit), algorithm, name, folder))
                        print(measured[-1].to_string(), flush=True)
            parts[name] = pd.concat(measured)
            rounds = pd.concat([parts[name] for name in PARTS if name in parts], ignore_index=True)
            rounds.to_csv(table, index=False, float_format="%.6g")
    settings = summarize(rounds)
    settings.to_csv(args.out / "settings.csv", index=False, float_format="%.4g")
    print(settings.to_string())
    draw(rounds, args.out / "rounds.svg")


if __name__ == "__main__":
    main()
