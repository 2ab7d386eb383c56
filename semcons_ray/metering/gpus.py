"""NVIDIA GPUs: which this machine has, which of them this process sees, and whether the installed torch can use them.

All of it comes from NVML and from files. torch is not imported, which would take seconds, and no CUDA context is made,
which would take GPU memory.

A GPU that is divided into slices (MIG) computes only through them, so its slices are listed in its place. Slices have
memory of their own; the energy counter and the power limit are those of the whole GPU, here called the card.
https://docs.nvidia.com/datacenter/tesla/mig-user-guide/
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from semcons_ray.metering.ledger import Place

IN_NVMLS_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Makes CUDA number GPUs as NVML does; left to itself, it puts the fastest first."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one.

    Attributes:
        uuid: Its own UUID, "GPU-..." or "MIG-...".
        card: UUID of the whole GPU; the same as `uuid` unless this is a slice.
        name: Its name in NVML.
        memory_gib: Its memory.
        compute_capability: Its CUDA compute capability, such as "9.0".
        bf16: Whether it computes in bfloat16 natively (from compute capability 8.0 on).
        power_limit_watts: Power limit of the whole GPU; None if it cannot be read.
    """

    uuid: str
    card: str
    name: str
    memory_gib: float
    compute_capability: str
    bf16: bool
    power_limit_watts: float | None


def list_gpus(nvml: Any = pynvml) -> list[Gpu]:
    """All GPUs of this machine, in NVML's order; empty without a driver.

    Args:
        nvml: The pynvml module.
    """
    return [gpu for card in _cards(nvml) for gpu in card]


def visible_gpus(environ: Mapping[str, str] = os.environ, nvml: Any = pynvml) -> list[Gpu]:
    """The GPUs that a process with this environment sees, in the order in which CUDA numbers them.

    CUDA_VISIBLE_DEVICES holds numbers, UUIDs or beginnings of UUIDs; entries after one that stands for no GPU, or for
    several, are ignored. For a GPU that is divided, a number or the whole GPU's UUID stands for its first slice.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables

    Args:
        environ: Environment variables of the process.
        nvml: The pynvml module.
    """
    cards = _cards(nvml)
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [card[0] for card in cards if card]
    visible = []
    for name in names.split(","):
        named = _named(name.strip(), cards)
        if len(named) != 1:
            break
        visible += named
    return visible


def _named(name: str, cards: list[list[Gpu]]) -> list[Gpu]:
    """The GPUs that an entry of CUDA_VISIBLE_DEVICES may stand for."""
    if name.isdigit():
        return cards[int(name)][:1] if int(name) < len(cards) else []
    if name.startswith("GPU-"):
        return [card[0] for card in cards if card and card[0].card.startswith(name)]
    if name.startswith("MIG-"):
        return [gpu for card in cards for gpu in card if gpu.uuid.startswith(name)]
    return []


def this_place(*, uses_gpu: bool) -> Place:
    """Where this process computes; a process that uses a GPU uses the first one that it sees, and no other."""
    used = visible_gpus()[:1] if uses_gpu else []
    return Place(
        node=socket.gethostname(),
        gpus=",".join(gpu.card for gpu in used),
        sliced=any(gpu.uuid != gpu.card for gpu in used),
    )


def cuda_fault(nvml: Any = pynvml, torch: Path | None = None) -> str:
    """Why the installed torch cannot compute on GPUs, in words for a message; empty if it can.

    A driver runs programs that were built for its own major version of CUDA, or for an earlier one:
    https://docs.nvidia.com/deploy/cuda-compatibility/

    Args:
        nvml: The pynvml module.
        torch: Folder of the torch package; None: the one that would be imported.
    """
    if torch is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return "torch is not installed"
        torch = Path(spec.origin).parent
    build = dict(re.findall(r"^(\w+)\b[^=\n]*= '(.+)'", (torch / "version.py").read_text(encoding="utf-8"), re.M))
    name = f"torch {build.get('__version__', '')}"
    if "hip" in build:  # AMD's, which torch calls cuda, too
        return ""
    if "cuda" not in build:
        return f"{name} is built without CUDA"
    with _opened(nvml) as driver:
        if driver is None:
            return "there is no NVIDIA driver"
        version = driver.nvmlSystemGetCudaDriverVersion_v2()
    if version // 1000 < int(build["cuda"].partition(".")[0]):
        return f"{name} is built for CUDA {build['cuda']}, and the driver has {version // 1000}.{version % 1000 // 10}"
    return ""


@contextmanager
def _opened(nvml: Any) -> Iterator[Any]:
    """NVML, opened while the block runs; None without a driver."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _cards(nvml: Any) -> list[list[Gpu]]:
    """For each card, its slices if it is divided (there may be none yet), else the card itself."""
    with _opened(nvml) as driver:
        if driver is None:
            return []
        try:
            return [_card(driver, driver.nvmlDeviceGetHandleByIndex(i)) for i in range(driver.nvmlDeviceGetCount())]
        except nvml.NVMLError:
            return []


def _card(nvml: Any, card: Any) -> list[Gpu]:
    return [_describe(nvml, handle, card) for handle in (_slices(nvml, card) if _is_cut(nvml, card) else [card])]


def _is_cut(nvml: Any, card: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(card)
    except nvml.NVMLError:  # of a kind that cannot be
        return False
    return bool(current)


def _slices(nvml: Any, card: Any) -> Iterator[Any]:
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)
        except nvml.NVMLError:  # places for slices may be empty
            continue


def _describe(nvml: Any, handle: Any, card: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    try:
        watts = nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1e3
    except nvml.NVMLError:
        watts = None
    return Gpu(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        card=_text(nvml.nvmlDeviceGetUUID(card)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_gib=round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 2),
        compute_capability=f"{major}.{minor}",
        bf16=major >= 8,
        power_limit_watts=watts,
    )


def _text(value: str | bytes) -> str:
    """Older releases of pynvml return bytes."""
    return value.decode() if isinstance(value, bytes) else value
