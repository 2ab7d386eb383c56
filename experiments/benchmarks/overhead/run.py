"""Seconds of a round in which clients do nothing: this package's fleet, raw Ray actors, and Flower's simulation.

    python experiments/benchmarks/overhead/run.py [--flower-python PATH]

A client gets a message and returns 64 answers. There are two worker processes, and 8 and 100 clients. The fleet and raw
Ray take turns, round by round, in one cluster; Flower runs after them, in a process with an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray

from semcons_ray.distributed.cluster import connect, list_nodes
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.distributed.ray_fleet import RayFleet
from semcons_ray.federation.fleet import Reply
from semcons_ray.federation.store import mark
from semcons_ray.messages import Answers
from semcons_ray.metering.environment import describe_environment

HERE = Path(__file__).parent
NUM_WORKERS, NUM_TEXTS, WARM_UP, ROUNDS = 2, 64, 5, 40
DOWNLINK = b"x" * 4096


def answers(client_id: int) -> bytes:
    texts = tuple(f"client {client_id} answers prompt {prompt} at some length" for prompt in range(NUM_TEXTS))
    return Answers(round_number=1, client_id=client_id, num_examples=1, answers=texts).encode()


@dataclass(frozen=True)
class NoOpSpec:
    environment: tuple[str, ...] = ()

    def build(self, worker: str) -> NoOpHost:
        return NoOpHost()


class NoOpHost:
    adapter_shapes: ClassVar[dict[str, tuple[int, ...]]] = {}

    def visit(self, client_id: int, round: int, downlink: bytes, evaluate: bool) -> Reply:
        return Reply(
            client_id=client_id, round=round, uplink=answers(client_id), train_loss=0.0, num_private=1,
            num_pseudo_labels=0, evaluation=None, rows=(),
        )  # fmt: skip

    def export_adapter(self, client_id: int, folder: Path) -> None:
        raise NotImplementedError


@ray.remote
class RawActor:
    """An actor as one would write it by hand: no restarts, no timeouts, no ledger."""

    def visit(self, client_id: int, downlink: bytes) -> bytes:
        return answers(client_id)


def compare(num_clients: int) -> dict[str, Any]:
    node = list_nodes()[0]
    shares = [tuple(range(start, num_clients, NUM_WORKERS)) for start in range(NUM_WORKERS)]
    plans = [WorkerPlan(f"worker-{i}", node.node_id, node.name, "", ids, 1, 0.0, 0) for i, ids in enumerate(shares)]
    state = Path(tempfile.mkdtemp())
    fleet = RayFleet(
        plans, {"": NoOpSpec()}, timeout_seconds=60, max_restarts=0, quorum=1.0, uses_gpu=False, state=state,
        mark=mark(state),
    )  # fmt: skip
    raw = [RawActor.options(num_cpus=0).remote() for _ in range(NUM_WORKERS)]  # type: ignore[attr-defined]

    def our_round(round: int) -> int:
        downlinks = dict.fromkeys(range(num_clients), DOWNLINK)
        return sum(len(reply.uplink) for reply in fleet.visit(round, downlinks, evaluate=False))

    def as_they_come(message: Any) -> int:  # a server that embeds while others work needs that
        pending = [raw[client % NUM_WORKERS].visit.remote(client, message) for client in range(num_clients)]
        received = 0
        while pending:
            done, pending = ray.wait(pending)
            received += sum(len(uplink) for uplink in ray.get(done))
        return received

    def raw_round(round: int) -> int:
        return as_they_come(ray.put(DOWNLINK))

    def direct_round(round: int) -> int:
        return as_they_come(DOWNLINK)

    def gathered_round(round: int) -> int:
        downlink_ref = ray.put(DOWNLINK)
        refs = [raw[client % NUM_WORKERS].visit.remote(client, downlink_ref) for client in range(num_clients)]
        return sum(len(uplink) for uplink in ray.get(refs))

    rounds = {
        "ours": our_round,
        "raw_ray": raw_round,
        "raw_ray_direct": direct_round,
        "raw_ray_gathered": gathered_round,
    }
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for round in range(1, WARM_UP + ROUNDS + 1):
        for name, run in rounds.items():
            began = time.perf_counter()
            received = run(round)
            if round > WARM_UP:
                seconds[name].append(time.perf_counter() - began)
            if received != sum(len(answers(client)) for client in range(num_clients)):
                raise SystemExit(f"{name} lost answers")
    fleet.close()
    for actor in raw:
        ray.kill(actor)
    case: dict[str, Any] = {"clients": num_clients}
    for name in rounds:
        case[f"{name}_seconds"] = statistics.median(seconds[name])
        if name != "ours":
            case[f"ours_over_{name}"] = case["ours_seconds"] / case[f"{name}_seconds"]
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flower-python", help="python of an environment with flwr[simulation]; without it, no Flower")
    args = parser.parse_args()
    with connect(None):
        cases = [compare(num_clients) for num_clients in (8, 100)]
    if args.flower_python:
        for case in cases:
            command = [args.flower_python, str(HERE / "flower_round.py"), str(case["clients"])]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            case.update(json.loads(output.splitlines()[-1]))
            case["flower_over_ours"] = case["flower_seconds"] / case["ours_seconds"]
    result = {"texts_per_client": NUM_TEXTS, "workers": NUM_WORKERS, "rounds": ROUNDS, "cases": cases,
              "environment": describe_environment()}  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    for case in cases:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in case.items()})


if __name__ == "__main__":
    main()
