"""Energy: read the counters that a node has, and share their joules out among the rows of its ledger.

Processes that share a device cannot be metered one by one (mlco2/codecarbon#936), so a counter is read once, by whoever
runs first on its node, and the joules between two readings are apportioned to the work done between them: a GPU's to
those who had that GPU, by busy time where they were several; the CPUs' to all on the node.

Counters:
  - NVML: total energy of each GPU in millijoules since the driver was loaded (Volta and later). Slices of a GPU (MIG)
    have none of their own and share the GPU's.
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
  - RAPL: energy of each CPU package and its DRAM in microjoules, which wraps at max_energy_range_uj.
    https://docs.kernel.org/power/powercap/powercap.html

All count whatever happens on the device, including its idle draw and other people's jobs.

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
"""Name of a node's counter of CPUs; those of GPUs have the GPUs' UUIDs."""


class EnergyMeter(Protocol):
    """A counter of energy."""

    name: str

    def read_joules(self) -> float:
        """Joules since the meter was made; NaN if the counter can no longer be read."""
        ...


class GpuMeter:
    """One GPU, whatever CUDA_VISIBLE_DEVICES says.

    Args:
        uuid: Which: a whole one, and no slice.
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
        """Joules of the GPU since the meter was made; NaN if it was lost."""
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            return math.nan
        return float(now - self._first) / 1e3


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


def open_meters(*, uses_gpu: bool, rapl_root: Path = RAPL_ROOT, nvml: Any = pynvml) -> dict[str, EnergyMeter]:
    """The counters of this node by name, `CPU` or a GPU's UUID; those that cannot be read are left out.

    Args:
        uses_gpu: Whether GPUs are wanted, too: those that idle beside a run on the CPU are not its doing.
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
    """Joules that a counter of a node went up by, from `window_start` to `window_end` (unix seconds, the node's clock).

    `counter` is `CPU` or a GPU's UUID.
    """

    node: str
    joules: float
    window_start: float
    window_end: float
    counter: str = CPU


class NodeMeter:
    """A node's counters read lap by lap, on the node and by the clock that the node's rows are stamped with."""

    def __init__(self, node: str, meters: Mapping[str, EnergyMeter]) -> None:
        self.node = node
        self.name = "+".join(sorted({meter.name for meter in meters.values()}))
        self._meters = dict(meters)
        self._last = {counter: (time.time(), meter.read_joules()) for counter, meter in self._meters.items()}

    def lap(self) -> list[EnergyWindow]:
        """Energy of each counter since the last lap, or since this object was made; of those that were not reset."""
        windows = []
        for counter, meter in self._meters.items():
            started_at, before = self._last[counter]
            self._last[counter] = now, joules = time.time(), meter.read_joules()
            if joules >= before:
                windows.append(EnergyWindow(self.node, joules - before, started_at, now, counter))
        return windows


def own_windows(windows: Iterable[EnergyWindow], places: Iterable[Place]) -> list[EnergyWindow]:
    """Of a run beside others, the windows whose joules are its own.

    Args:
        windows: What counters went up by.
        places: Of workers that share their GPUs with no other process. A slice of a GPU shares the GPU's counter.
    """
    own = {gpu for place in places if not place.sliced for gpu in split_gpus(place.gpus)}
    return [window for window in windows if window.counter in own]


@dataclass(frozen=True)
class Draw:
    """Watts of a busy worker, on the CPU and of its GPUs."""

    cpu_watts: float
    gpu_watts: float = 0.0


def estimate_draw(num_threads: float, num_gpus: float = 0.0, gpu_watts: float = 0.0) -> Draw:
    """Of a busy worker: `CPU_THREAD_WATTS` a CPU thread, and its share of GPUs at `gpu_watts`, their limit."""
    return Draw(num_threads * CPU_THREAD_WATTS, num_gpus * gpu_watts)


def apportion(
    rows: Iterable[LedgerRow], measured: Iterable[EnergyWindow], draws: Mapping[str, Draw]
) -> list[LedgerRow]:
    """The rows with their energy filled in.

    A row draws from the counters of its GPUs, and from the CPUs' of its node. It belongs to a window of such a counter
    if its middle lies in it (so that a clock's jitter cannot cut it in two). The joules of a window are shared among
    its busy rows: a GPU's by busy seconds; the CPUs' by busy seconds times the watts of the workers' threads. The draw
    of an idle machine is part of what the work cost, so idle rows get 0 J and the busy ones bear it, except where a
    window has only idle rows: they share it by duration. So the shares of a window sum to its joules, whenever it has a
    row of more than zero length.

    What no window covers (a counter that is not there, or a round from before a resume) is estimated: duration times
    watts; 0 J for an idle row. A row is "measured" if nothing of it is estimated, but for this: where GPUs are metered
    and CPUs are not, the CPUs' part of the work on GPUs is left out.

    Args:
        rows: Rows of any nodes and rounds.
        measured: What counters went up by. Windows of one should not overlap: the first that holds a row takes it.
        draws: Watts of each worker when busy, see `estimate_draw`; a worker not named is taken for one CPU thread.

    Returns:
        New rows in the order of `rows`, each "measured" or "estimated".
    """
    rows = list(rows)
    users: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
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
    return [_with_energy(row, own, _draw(row, draws)) for row, own in zip(rows, shares, strict=True)]


def _is_within(row: LedgerRow, window: EnergyWindow) -> bool:
    return window.window_start <= row.started_at + row.duration_seconds / 2 <= window.window_end


def _draw(row: LedgerRow, draws: Mapping[str, Draw]) -> Draw:
    return Draw(0.0) if row.stage == "idle" else draws.get(row.worker, Draw(CPU_THREAD_WATTS))


def _weight(row: LedgerRow, counter: str, draws: Mapping[str, Draw]) -> float:
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
