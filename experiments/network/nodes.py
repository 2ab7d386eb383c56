"""A Ray cluster over a network of namespaces."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path

from links import HEAD, Network

PORT = 6379
START_SECONDS, RUN_SECONDS = 120.0, 600.0
REPOSITORY = Path(__file__).parents[2]


class Cluster:
    """A head that has no core for clients, and a node with one core in each client's namespace. Its nodes end with the
    network.

    Args:
        network: The network.
        folder: For logs and Ray's own files; its path must be short, for Ray's sockets.

    Raises:
        RuntimeError: A node did not start; the message has what it said.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._folder = folder
        self._env = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            # By default a message that takes longer than 10 s is asked for again, and sent again from its beginning.
            "RAY_object_manager_pull_timeout_ms": "600000",
        }
        self.address = f"{network.address(HEAD)}:{PORT}"
        head = ("--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}/ray")
        self._start(HEAD, *head)
        for name in network.clients:
            self._start(name, f"--address={self.address}", "--num-cpus=1")

    def run(self, *arguments: str) -> str:
        """Run Python on the head; returns what it said.

        Raises:
            RuntimeError: It failed.
        """
        log = self._folder / "run.log"
        code = self._network.start(HEAD, [sys.executable, *arguments], log, self._env).wait(RUN_SECONDS)
        said = log.read_text(encoding="utf-8")
        if code:
            raise RuntimeError(f"{' '.join(arguments)} ended with {code}:\n{said}")
        return said

    def _start(self, name: str, *options: str) -> None:
        """Start a node, and wait for it: two that start at once on one machine may choose the same files."""
        common = ("--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block")
        command = (sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common)
        log = self._folder / f"{name}.log"
        own = f"--node-ip-address={self._network.address(name)}"
        process = self._network.start(name, [*command, own], log, self._env)
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started." not in log.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray node {name} did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
