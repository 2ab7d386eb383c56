"""Energy: read a node's own counters where it has them, and share the joules out among the rows of its ledger.

Processes that share a device cannot be metered one by one (mlco2/codecarbon#936), so a node is metered once, by
whoever runs first on it, and the joules between two readings are apportioned to the work done between them.

Counters:
  - NVML: total energy of each GPU in millijoules since the driver was loaded (Volta and later).
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
  - RAPL: energy of each CPU package and its DRAM in microjoules, which wraps at max_energy_range_uj.
    https://docs.kernel.org/power/powercap/powercap.html

Both count all that happens on the device, including its idle draw and other people's jobs.

The estimate, where there is no counter: `CPU_THREAD_WATTS` a busy CPU thread, and a GPU at its power limit. It is what
codecarbon falls back to for a CPU it does not know (codecarbon 3.3.2, core/cpu.py, DEFAULT_POWER_PER_CORE). codecarbon
itself is no dependency of ours. Its table of thermal design powers names a whole package, so a machine that sees a
slice of one, as every virtual machine does, would be charged for all of it: 350 W for two threads of a Xeon 8480+.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import pynvml

from semcons_ray.metering.ledger import LedgerRow

CPU_THREAD_WATTS = 4.0
RAPL_ROOT = Path("/sys/class/powercap")
# The smallest wrap seen is 65.5 kJ: at one reading a minute it would take over 1 kW in one domain to miss a wrap.
RAPL_SAMPLE_SECONDS = 60.0


class EnergyMeter(Protocol):
    """Counts the energy of the node it runs on."""

    name: str
    source: Literal["measured"]

    def read_joules(self) -> float:
        """Joules of the whole node since the meter was made; NaN if the counter can no longer be read."""
        ...


class NvmlMeter:
    """All GPUs that the node shows, whatever CUDA_VISIBLE_DEVICES says.

    Args:
        nvml: The pynvml module.

    Raises:
        nvml.NVMLError: There is no driver or no GPU, or a GPU has no energy counter.
    """

    name = "nvml"
    source: Literal["measured"] = "measured"

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        if not self._handles:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)
        self._first = [nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]

    def read_joules(self) -> float:
        """Joules of all GPUs since the meter was made; NaN if one was lost."""
        try:
            now = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]
        except self._nvml.NVMLError:
            return math.nan
        return float(sum(now) - sum(self._first)) / 1e3


class _RaplDomain:
    """One counter: its microjoules since it was opened, wraps added back."""

    def __init__(self, folder: Path) -> None:
        self._counter = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self.last = int(self._counter.read_text())
        self._total = 0

    def read(self) -> int:
        now = int(self._counter.read_text())
        self._total += now - self.last if now >= self.last else now - self.last + self._range
        self.last = now
        return self._total


class RaplMeter:
    """All CPU packages and their DRAM.

    A daemon thread reads the counters once in a while, because more than one wrap between two readings is invisible.

    Args:
        root: The powercap folder.
        sample_seconds: Time between two readings of the thread.

    Raises:
        FileNotFoundError: The machine shows no RAPL package (virtual machines mostly don't).
        PermissionError: The counters are for root only, as kernels since 5.10 have them (CVE-2020-8694).
    """

    name = "rapl"
    source: Literal["measured"] = "measured"

    def __init__(self, root: Path = RAPL_ROOT, sample_seconds: float = RAPL_SAMPLE_SECONDS) -> None:
        self._domains = _open_domains(root)
        self._lock = threading.Lock()
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        # The thread gets the parts and not the meter, or the meter would never be finalized.
        arguments = (self._domains, self._lock, stop, sample_seconds)
        threading.Thread(target=_keep_reading, args=arguments, name="rapl", daemon=True).start()

    def read_joules(self) -> float:
        """Joules of all packages and DRAM since the meter was made; NaN if a counter became unreadable."""
        return _read_domains(self._domains, self._lock)


def _open_domains(root: Path) -> list[_RaplDomain]:
    """Packages and DRAM: "core" and "uncore" lie within a package, "psys" holds it, and "intel-rapl-mmio" repeats it.

    Some CPUs of several dies show their one counter as "package-0-die-0", "package-0-die-1" and so on
    (mlco2/codecarbon#1274): dies that read alike to within a joule are counted once.
    """
    domains: list[_RaplDomain] = []
    die_readings: dict[str, list[int]] = {}
    for folder in sorted(root.glob("intel-rapl:*")):
        name = (folder / "name").read_text().strip()
        if name != "dram" and not name.startswith("package"):
            continue
        domain = _RaplDomain(folder)
        if die := re.fullmatch(r"(package-\d+)-die-\d+", name):
            readings = die_readings.setdefault(die[1], [])
            if any(domain.last > 0 and abs(domain.last - other) <= 1_000_000 for other in readings):
                continue
            readings.append(domain.last)
        domains.append(domain)
    if not domains:
        raise FileNotFoundError(f"no CPU energy counters under {root}")
    return domains


def _read_domains(domains: list[_RaplDomain], lock: threading.Lock) -> float:
    with lock:
        try:
            return sum(domain.read() for domain in domains) / 1e6
        except (OSError, ValueError):
            return math.nan


def _keep_reading(domains: list[_RaplDomain], lock: threading.Lock, stop: threading.Event, seconds: float) -> None:
    while not stop.wait(seconds):
        _read_domains(domains, lock)


class CombinedMeter:
    """The sum of several meters of one node."""

    source: Literal["measured"] = "measured"

    def __init__(self, meters: Sequence[EnergyMeter]) -> None:
        self._meters = tuple(meters)
        self.name = "+".join(meter.name for meter in self._meters)

    def read_joules(self) -> float:
        """Joules of all the meters; NaN if one of them fails."""
        return sum(meter.read_joules() for meter in self._meters)


def detect_meter(*, uses_gpu: bool, rapl_root: Path = RAPL_ROOT, nvml: Any = pynvml) -> EnergyMeter | None:
    """The best meter of this node for a run that does or doesn't compute on GPUs; None: only an estimate is possible.

    A run on GPUs needs NVML, and RAPL joins where it can be read; without it ("nvml" alone, not "nvml+rapl") the CPU's
    joules are left out. A run on the CPU takes RAPL alone: GPUs that idle beside it are not its doing.
    """
    meters: list[EnergyMeter] = []
    if uses_gpu:
        try:
            meters.append(NvmlMeter(nvml))
        except nvml.NVMLError:
            return None
    with contextlib.suppress(OSError, ValueError):
        meters.append(RaplMeter(rapl_root))
    if len(meters) > 1:
        return CombinedMeter(meters)
    return meters[0] if meters else None


@dataclass(frozen=True)
class NodeEnergy:
    """Joules that a node used from `window_start` to `window_end` (unix seconds, the node's own clock)."""

    node: str
    joules: float
    window_start: float
    window_end: float


class NodeMeter:
    """A meter read lap by lap, on the node and by the clock that the node's rows are stamped with."""

    def __init__(self, node: str, meter: EnergyMeter) -> None:
        self.node = node
        self.name = meter.name
        self._meter = meter
        self._started_at = time.time()
        self._joules = meter.read_joules()

    def lap(self) -> NodeEnergy | None:
        """Energy since the last lap, or since this object was made; None if the counter failed or was reset."""
        started_at, before = self._started_at, self._joules
        self._started_at, self._joules = time.time(), self._meter.read_joules()
        joules = self._joules - before
        return NodeEnergy(self.node, joules, started_at, self._started_at) if joules >= 0 else None


def estimate_watts(num_threads: float, num_gpus: float = 0.0, gpu_watts: float = 0.0) -> float:
    """Watts of a busy worker: `CPU_THREAD_WATTS` a CPU thread, and its share of GPUs at `gpu_watts`, their limit."""
    return num_threads * CPU_THREAD_WATTS + num_gpus * gpu_watts


def apportion(rows: Iterable[LedgerRow], measured: Iterable[NodeEnergy], watts: Mapping[str, float]) -> list[LedgerRow]:
    """The rows with their energy filled in.

    A row belongs to a metered window of its node if its middle lies in it (so that a clock's jitter cannot cut it in
    two), and its estimate is duration times its worker's watts. The joules of a window are shared among its busy rows
    in proportion to their estimates: by busy seconds where all workers draw alike, and a GPU worker gets more than a
    CPU one beside it. The draw of an idle machine is part of what the work cost, so idle rows get 0 J and the busy
    ones bear it, except where a window has only idle rows: they share it by duration. So the rows of a window sum to
    its joules, whenever it has a row of more than zero length.

    A row in no window (a node without a meter, or a round from before a resume) gets its estimate; an idle one 0 J.

    Args:
        rows: Rows of any nodes and rounds.
        measured: What nodes used. Windows of one node should not overlap: the first that holds a row takes it.
        watts: Watts of each worker when busy, see `estimate_watts`; a worker not named is taken for one CPU thread.

    Returns:
        New rows in the order of `rows`, each "measured" or "estimated".
    """
    rows = list(rows)
    windows: dict[str, list[tuple[NodeEnergy, list[int]]]] = {}
    for window in measured:
        windows.setdefault(window.node, []).append((window, []))
    joules = [_estimate_joules(row, watts) for row in rows]
    is_measured = [False] * len(rows)
    for index, row in enumerate(rows):
        middle = row.started_at + row.duration_seconds / 2
        for window, members in windows.get(row.node, ()):
            if window.window_start <= middle <= window.window_end:
                members.append(index)
                break
    for window, members in (pair for pairs in windows.values() for pair in pairs):
        weights = [joules[index] for index in members]
        if sum(weights) <= 0:
            weights = [rows[index].duration_seconds for index in members]
        total = sum(weights)
        for index, weight in zip(members, weights, strict=True):
            joules[index] = window.joules * (weight / total) if total > 0 else 0.0
            is_measured[index] = True
    return [
        msgspec.structs.replace(row, energy_joules=value, energy_source="measured" if metered else "estimated")
        for row, value, metered in zip(rows, joules, is_measured, strict=True)
    ]


def _estimate_joules(row: LedgerRow, watts: Mapping[str, float]) -> float:
    return 0.0 if row.stage == "idle" else row.duration_seconds * watts.get(row.worker, CPU_THREAD_WATTS)
