"""A pynvml of plain objects and a powercap tree of plain files."""

# ruff: noqa: N802  (names are NVML's)

from pathlib import Path
from types import SimpleNamespace


class FakeNvml:
    """As much of the pynvml module as this package calls.

    GPU i has the UUID GPU-i and so many millijoules (None: no counter). `slices` says in how many slices a GPU is cut,
    by its index: slice j of GPU i has the UUID MIG-i-j and 10 GiB, and sits in the place after an empty one.
    """

    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_NOT_SUPPORTED = 3

    class NVMLError(Exception):
        pass

    def __init__(
        self, millijoules=(), driver=True, capability=(9, 0), power_limit=700_000, slices=None, cuda=13000, uuids=None
    ):
        self.millijoules = list(millijoules)
        self.driver = driver
        self.capability = capability
        self.power_limit = power_limit
        self.slices = slices or {}
        self.cuda = cuda
        self.uuids = uuids or [f"GPU-{index}" for index in range(len(self.millijoules))]
        self.open = 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self.cuda

    def nvmlDeviceGetCount(self):
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.uuids:
            raise self.NVMLError("Not Found")
        return self.uuids.index(uuid)

    def nvmlDeviceGetUUID(self, handle):
        return self.uuids[handle] if isinstance(handle, int) else "MIG-{}-{}".format(*handle)

    def nvmlDeviceGetMigMode(self, handle):
        if not self.slices:
            raise self.NVMLError("Not Supported")
        return [int(handle in self.slices)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):
        if not 1 <= index <= self.slices[handle]:
            raise self.NVMLError("Not Found")
        return handle, index - 1

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not isinstance(handle, int) or self.millijoules[handle] is None:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]

    def nvmlDeviceGetName(self, handle):
        return f"GPU {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=(80 if isinstance(handle, int) else 10) * 2**30)

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        if not isinstance(handle, int):
            raise self.NVMLError("Not Supported")
        return self.capability

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        if not isinstance(handle, int) or self.power_limit is None:
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
