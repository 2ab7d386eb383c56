"""A pynvml of plain objects and a powercap tree of plain files."""

# ruff: noqa: N802  (names are NVML's)

from pathlib import Path
from types import SimpleNamespace


class FakeNvml:
    """As much of the pynvml module as this package calls."""

    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_NOT_SUPPORTED = 3

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules=(), driver=True, capability=(9, 0), power_limit=700_000):
        self.millijoules = list(millijoules)  # None: no counter
        self.driver = driver
        self.capability = capability
        self.power_limit = power_limit
        self.open = 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules[handle] is None:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]

    def nvmlDeviceGetName(self, handle):
        return f"GPU {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 * 2**30)

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self.capability

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        if self.power_limit is None:
            raise self.NVMLError("Not Supported")
        return self.power_limit


def write_domain(root: Path, folder: str, name: str, microjoules: int, wrap: int = 1_000_000_000) -> Path:
    """One powercap zone; returns its counter."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"
