"""Namespaces on this machine that reach each other over links of a set rate only.

A head and its clients have a network namespace each, with one interface `eth0`. All are plugged into a bridge, which is
in a namespace of its own, so that no address, route or firewall of the machine takes part.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

PREFIX = "semcons-net-"
SWITCH, HEAD = "switch", "head"
BURST, QUEUE = "32kbit", "2000ms"
"""What a link may send at once, and how long a packet may wait for it before it is dropped."""


class Network:
    """A head and clients on a bridge, for the time of a `with` block; what runs in them at its end is killed.

    Args:
        num_clients: Number of clients, named client-0 and so on.
        shared: Whether `limit` is about the head's link, which all clients share; if not, about one of each client.
        congestion: How TCP avoids congestion, by the kernel's name for it.

    Raises:
        subprocess.CalledProcessError: Namespaces cannot be made here, or the kernel does not know that congestion
            control or allow it.
    """

    def __init__(self, num_clients: int, *, shared: bool = False, congestion: str = "reno") -> None:
        self.clients = tuple(f"client-{i}" for i in range(num_clients))
        self.names = (HEAD, *self.clients)
        self._limited = (HEAD,) if shared else self.clients
        self._congestion = congestion

    def __enter__(self) -> Network:
        _remove()  # what a killed run left
        try:
            self._make()
        except BaseException:
            _remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        _remove()

    def address(self, name: str) -> str:
        """IP address of the head or a client."""
        return f"10.77.0.{self.names.index(name) + 1}"

    def limit(self, mbit: float) -> None:
        """Give links a rate in Mbit/s in each direction, at which packets are sent with all their headers."""
        rate = ("tbf", "rate", f"{mbit}mbit", "burst", BURST, "latency", QUEUE)
        for name in self._limited:
            for place, device in ((SWITCH, name), (name, "eth0")):
                _run("tc", "-n", PREFIX + place, "qdisc", "replace", "dev", device, "root", *rate)

    def start(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a process in a namespace; what it says is written to a file."""
        inside = ["ip", "netns", "exec", PREFIX + name, *command]
        with log.open("wb") as file:
            return subprocess.Popen(inside, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)

    def _make(self) -> None:
        for name in (SWITCH, *self.names):
            _run("ip", "netns", "add", PREFIX + name)
            _run("ip", "-n", PREFIX + name, "link", "set", "lo", "up")
        switch = ("ip", "-n", PREFIX + SWITCH, "link")
        _run(*switch, "add", "br0", "type", "bridge")
        _run(*switch, "set", "br0", "up")
        for name in self.names:
            there = ("ip", "-n", PREFIX + name)
            _run(*switch, "add", name, "type", "veth", "peer", "name", "eth0", "netns", PREFIX + name)
            # No packet is divided on its way, so the counters have the headers of each.
            _run(*switch, "set", name, "master", "br0", "gso_max_segs", "1", "up")
            _run(*there, "link", "set", "eth0", "gso_max_segs", "1", "up")
            _run(*there, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _run(*there, "route", "add", "default", "dev", "eth0")  # by which Ray finds its own address
            inside = ("ip", "netns", "exec", PREFIX + name)
            _run(*inside, "sysctl", "-w", f"net.ipv4.tcp_congestion_control={self._congestion}")


class Counters:
    """Bytes that crossed each link, headers included, noted by a thread all the time during a `with` block.

    Args:
        network: Whose links.
        seconds: Time between two notes.
    """

    def __init__(self, network: Network, seconds: float = 0.02) -> None:
        self._network = network
        self._seconds = seconds
        self._times: list[float] = []
        self._counts: list[dict[str, tuple[int, int]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._note)

    def __enter__(self) -> Counters:
        # /proc shows the interfaces of a process's namespace.
        self._inside = self._network.start(SWITCH, ["sleep", "infinity"], Path(os.devnull), os.environ)
        while HEAD not in _count(self._inside.pid):
            time.sleep(0.01)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._inside.kill()
        self._inside.wait()

    def between(self, start: float, end: float) -> tuple[int, int]:
        """Bytes to all clients, and from all clients, between two times, unix seconds."""
        ways = np.array([[count[name] for name in self._network.clients] for count in self._counts]).sum(axis=1).T
        up, down = (int(np.diff(np.interp((start, end), self._times, way))[0]) for way in ways)
        return down, up

    def _note(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._seconds)
            self._counts.append(_count(self._inside.pid))
            self._times.append(time.time())


def _count(pid: int) -> dict[str, tuple[int, int]]:
    """Bytes that each interface received and sent, of those that a process sees; see /proc/net/dev in proc(5)."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/dev").read_text(encoding="utf-8").splitlines()[2:]]
    return {row[0].rstrip(":"): (int(row[1]), int(row[9])) for row in rows}


def _remove() -> None:
    namespaces = json.loads(_run("ip", "-j", "netns", "list") or "[]")
    for name in [entry["name"] for entry in namespaces if entry["name"].startswith(PREFIX)]:
        for pid in _run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "del", name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
