"""Seconds of plain Ray calls over a link: nothing sent, an argument of a size, a result of that size.

    python transfers.py ADDRESS BYTES REPETITIONS

It is for the head's node, with one more node beside it. Prints a JSON list for each of empty, down and up.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class Client:
    """The other end."""

    def receive(self, message: bytes) -> int:
        """Take a message."""
        return len(message)

    def send(self, size: int) -> bytes:
        """Return a message of this size."""
        return bytes(size)


def main() -> None:
    address, size, repetitions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ray.init(address=address, log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    there = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here)
    client = Client.options(scheduling_strategy=NodeAffinitySchedulingStrategy(there, soft=False)).remote()  # type: ignore[attr-defined]
    ask: dict[str, Any] = {
        "empty": lambda: client.receive.remote(b""),
        "down": lambda: client.receive.remote(ray.put(bytes(size))),
        "up": lambda: client.send.remote(size),
    }
    ray.get(client.receive.remote(b""))
    taken: dict[str, list[float]] = {}
    for name, call in ask.items():
        for _ in range(repetitions):
            began = time.perf_counter()
            ray.get(call())
            taken.setdefault(name, []).append(time.perf_counter() - began)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
