"""Energy: reads the counters of a node, and apportions their joules to the rows of the ledger.

Processes that share a device cannot be metered one by one (mlco2/codecarbon#936). So a counter is read by one process
of its node, and the joules between two readings are apportioned to the work done between them: a GPU's to the work done
on that GPU, by busy time if there was more than one piece; the CPUs' to all work on the node.

Counters:
  - NVML: total energy of each GPU in millijoules since the driver was loaded (Volta and later). Slices of a GPU (MIG)
    have none of their own and share the GPU's.
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
  - RAPL: energy of each CPU package and its DRAM in microjoules, which wraps at max_energy_range_uj.
    https://docs.kernel.org/power/powercap/powercap.html

Counters include everything that happens on the device: its idle draw, and other people's jobs.

Where there is no counter, energy is estimated: `CPU_THREAD_WATTS` for a busy CPU thread, and the power limit for a busy
GPU. The former is what codecarbon assumes for a CPU that it does not know (codecarbon 3.3.2, core/cpu.py,
DEFAULT_POWER_PER_CORE). codecarbon itself is not used: its table of thermal design powers is for whole packages, so a
machine that has a part of one, as virtual machines do, would be charged for all of it: 350 W for two threads of a Xeon
8480+.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pynvml

from semcons_ray.metering.gpus import list_gpus
from semcons_ray.metering.ledger import LedgerRow, Place, split_gpus

CPU_THREAD_WATTS = 4.0
RAPL_ROOT = Path("/sys/class/powercap")
# The smallest wrap seen is 65.5 kJ: at one reading a minute it would take over 1 kW in one domain to miss a wrap.
RAPL_SAMPLE_SECONDS = 60.0
CPU = ""
"""Name of the counter of a node's CPUs; counters of GPUs are named by the GPUs' UUIDs."""


class EnergyMeter(Protocol):
    """An energy counter."""

    name: str

    def read_joules(self) -> float:
        """Joules since the meter was made; NaN if the counter can no longer be read."""
        ...


class GpuMeter:
    """The energy counter of one GPU, whatever CUDA_VISIBLE_DEVICES says.

    Args:
        uuid: The GPU's UUID: of a whole GPU, not of a slice.
        nvml: The pynvml module.

    Raises:
        nvml.NVMLError: There is no driver or no such GPU, or it has no energy counter.
    """

    name = "nvml"

    def __init__(self, uuid: str, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._first = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def read_joules(self) -> float:
        """Joules of the GPU since the meter was made; NaN if the GPU can no longer be read."""
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            return math.nan
        return float(now - self._first) / 1e3


class _RaplDomain:
    """One RAPL counter: microjoules since it was opened, corrected for wraps."""

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
    """The energy counters of all CPU packages and their DRAM.

    A daemon thread reads them regularly, because more than one wrap between two readings cannot be noticed.

    Args:
        root: The powercap folder.
        sample_seconds: Seconds between two readings of the thread.

    Raises:
        FileNotFoundError: The machine shows no RAPL package (virtual machines mostly don't).
        PermissionError: The counters are for root only, as kernels since 5.10 have them (CVE-2020-8694).
    """

    name = "rapl"

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
    """Counters of packages and DRAM. Others would count twice: "core" and "uncore" are parts of a package, "psys" holds
    it, and "intel-rapl-mmio" repeats it.

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


def open_meters(*, uses_gpu: bool, rapl_root: Path = RAPL_ROOT, nvml: Any = pynvml) -> dict[str, EnergyMeter]:
    """The counters of this node by name, which is `CPU` or a GPU's UUID; those that cannot be read are left out.

    Args:
        uses_gpu: Whether GPUs are included; GPUs that idle beside a run on the CPU are not.
        rapl_root: The powercap folder.
        nvml: The pynvml module.
    """
    meters: dict[str, EnergyMeter] = {}
    for card in dict.fromkeys(gpu.card for gpu in list_gpus(nvml)) if uses_gpu else ():
        with contextlib.suppress(nvml.NVMLError):
            meters[card] = GpuMeter(card, nvml)
    with contextlib.suppress(OSError, ValueError):
        meters[CPU] = RaplMeter(rapl_root)
    return meters


@dataclass(frozen=True)
class EnergyWindow:
    """How much a counter of a node went up in a stretch of time.

    Attributes:
        node: Host name of the node.
        joules: Energy in that time.
        window_start: Start by the node's clock, unix seconds.
        window_end: End by the node's clock, unix seconds.
        counter: `CPU`, or a GPU's UUID.
    """

    node: str
    joules: float
    window_start: float
    window_end: float
    counter: str = CPU


class NodeMeter:
    """Reads a node's counters lap by lap, on the node itself, whose clock also stamps the ledger rows of its work.

    Args:
        node: Host name of the node.
        meters: Its counters by name; see `open_meters`.
    """

    def __init__(self, node: str, meters: Mapping[str, EnergyMeter]) -> None:
        self.node = node
        self.name = "+".join(sorted({meter.name for meter in meters.values()}))
        self._meters = dict(meters)
        self._last = {counter: (time.time(), meter.read_joules()) for counter, meter in self._meters.items()}

    def lap(self) -> list[EnergyWindow]:
        """Energy by each counter since the last lap, or since this object was made; a counter that was reset is left
        out."""
        windows = []
        for counter, meter in self._meters.items():
            started_at, before = self._last[counter]
            self._last[counter] = now, joules = time.time(), meter.read_joules()
            if joules >= before:
                windows.append(EnergyWindow(self.node, joules - before, started_at, now, counter))
        return windows


def own_windows(windows: Iterable[EnergyWindow], places: Iterable[Place]) -> list[EnergyWindow]:
    """The windows whose joules belong to one run alone, where other runs go on beside it.

    Args:
        windows: Windows of all counters.
        places: Places of the run's workers that share their GPUs with no other process. Slices of a GPU are left out,
            since they share its counter.
    """
    own = {gpu for place in places if not place.sliced for gpu in split_gpus(place.gpus)}
    return [window for window in windows if window.counter in own]


@dataclass(frozen=True)
class Draw:
    """Watts that a busy worker is taken to draw, on CPUs and on GPUs."""

    cpu_watts: float
    gpu_watts: float = 0.0


def estimate_draw(num_threads: float, num_gpus: float = 0.0, gpu_watts: float = 0.0) -> Draw:
    """The draw of a busy worker: `CPU_THREAD_WATTS` for each CPU thread, and `gpu_watts`, the power limit, for each
    GPU."""
    return Draw(num_threads * CPU_THREAD_WATTS, num_gpus * gpu_watts)


def apportion(
    rows: Iterable[LedgerRow], measured: Iterable[EnergyWindow], draws: Mapping[str, Draw | None]
) -> list[LedgerRow]:
    """Fill in the energy of ledger rows.

    A row's energy comes from the counters of its GPUs, and from the CPU counter of its node. The row belongs to that
    window of a counter in which its middle lies, so that a clock's jitter cannot cut it in two. The joules of a window
    are shared among its busy rows: a GPU's by busy seconds, the CPUs' by busy seconds times the watts of the workers'
    threads. The draw of an idle machine is part of what the work costs, so idle rows get 0 J and busy rows bear it. If
    a window has only idle rows, they share it by duration. So the shares of a window sum to its joules, unless all its
    rows have zero length.

    What no window covers (there is no counter, or the row is from before a resume) is estimated as duration times
    watts, and 0 J for an idle row. A row is "measured" if nothing of it is estimated. There is one exception: where
    GPUs are metered and CPUs are not, the CPUs' part of work on GPUs is left out and not estimated.

    Args:
        rows: Rows of any nodes and rounds.
        measured: Windows of the counters. Those of one counter should not overlap: the first that holds a row takes it.
        draws: Watts of each worker when busy, see `estimate_draw`; a worker without an entry is taken for one CPU
            thread. None: its work is done elsewhere, by machines of which nothing is known.

    Returns:
        New rows in the order of `rows`, each "measured" or "estimated", or "unavailable" where work is done elsewhere.
    """
    rows = list(rows)
    elsewhere = {worker for worker, draw in draws.items() if draw is None}
    users: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        if row.worker in elsewhere:
            continue
        for counter in (CPU, *split_gpus(row.gpus)):
            users.setdefault((row.node, counter), []).append(index)
    shares: list[dict[str, float]] = [{} for _ in rows]
    for window in measured:
        members = [
            index
            for index in users.get((window.node, window.counter), ())
            if window.counter not in shares[index] and _is_within(rows[index], window)
        ]
        weights = [_weight(rows[index], window.counter, draws) for index in members]
        if sum(weights) <= 0:
            weights = [rows[index].duration_seconds for index in members]
        total = sum(weights)
        for index, weight in zip(members, weights, strict=True):
            shares[index][window.counter] = window.joules * (weight / total) if total > 0 else 0.0
    return [
        row if row.worker in elsewhere else _with_energy(row, own, _draw(row, draws))
        for row, own in zip(rows, shares, strict=True)
    ]


def _is_within(row: LedgerRow, window: EnergyWindow) -> bool:
    return window.window_start <= row.started_at + row.duration_seconds / 2 <= window.window_end


def _draw(row: LedgerRow, draws: Mapping[str, Draw | None]) -> Draw:
    return Draw(0.0) if row.stage == "idle" else draws.get(row.worker) or Draw(CPU_THREAD_WATTS)


def _weight(row: LedgerRow, counter: str, draws: Mapping[str, Draw | None]) -> float:
    if counter == CPU:
        return row.duration_seconds * _draw(row, draws).cpu_watts
    return 0.0 if row.stage == "idle" else row.duration_seconds


def _with_energy(row: LedgerRow, shares: Mapping[str, float], draw: Draw) -> LedgerRow:
    """The row with its shares of windows, and estimates for what they do not cover."""
    gpus = split_gpus(row.gpus)
    estimates = {gpu: row.duration_seconds * draw.gpu_watts / len(gpus) for gpu in gpus if gpu not in shares}
    if CPU not in shares and (estimates or not gpus):
        estimates[CPU] = row.duration_seconds * draw.cpu_watts
    return msgspec.structs.replace(
        row,
        energy_joules=sum(shares.values()) + sum(estimates.values()),
        energy_source="estimated" if estimates else "measured",
    )
