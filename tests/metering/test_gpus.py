from pathlib import Path

import pytest

from semcons_ray.metering import gpus as module
from semcons_ray.metering.gpus import cuda_fault, list_gpus, this_place, visible_gpus
from semcons_ray.metering.ledger import Place
from tests.metering.fakes import FakeNvml


def test_gpus_are_described_and_nvml_is_closed_again():
    nvml = FakeNvml([0, 0])
    gpus = list_gpus(nvml)
    assert [(gpu.uuid, gpu.card, gpu.name, gpu.memory_gib, gpu.bf16, gpu.power_limit_watts) for gpu in gpus] == [
        ("GPU-0", "GPU-0", "GPU 0", 80.0, True, 700.0),
        ("GPU-1", "GPU-1", "GPU 1", 80.0, True, 700.0),
    ]
    assert nvml.open == 0


def test_an_old_gpu_has_no_bf16_and_may_have_no_power_limit():
    (gpu,) = list_gpus(FakeNvml([0], capability=(7, 5), power_limit=None))
    assert (gpu.compute_capability, gpu.bf16, gpu.power_limit_watts) == ("7.5", False, None)


def test_no_driver_no_gpus():
    assert list_gpus(FakeNvml([0], driver=False)) == []
    assert visible_gpus({}, FakeNvml([0], driver=False)) == []


def test_slices_take_the_place_of_the_gpu_that_is_cut():
    gpus = list_gpus(FakeNvml([0, 0, 0], slices={1: 2, 2: 0}))
    assert [(gpu.uuid, gpu.card, gpu.memory_gib) for gpu in gpus] == [
        ("GPU-0", "GPU-0", 80.0),
        ("MIG-1-0", "GPU-1", 10.0),
        ("MIG-1-1", "GPU-1", 10.0),
    ]
    assert gpus[1].power_limit_watts == 700.0  # the card's
    assert gpus[1].compute_capability == "9.0"


UUIDS = ["GPU-8f6e", "GPU-8a00", "GPU-1b2c"]


@pytest.mark.parametrize(
    ("names", "visible"),
    [
        (None, UUIDS),
        ("", []),
        ("NoDevFiles", []),
        ("-1", []),
        ("2", ["GPU-1b2c"]),
        ("2,0", ["GPU-1b2c", "GPU-8f6e"]),
        ("1, 2", ["GPU-8a00", "GPU-1b2c"]),
        ("1,-1,2", ["GPU-8a00"]),
        ("0,7,1", ["GPU-8f6e"]),
        ("GPU-1b2c,GPU-8f6e", ["GPU-1b2c", "GPU-8f6e"]),
        ("GPU-1,0", ["GPU-1b2c", "GPU-8f6e"]),
        ("GPU-8", []),  # of two
        ("1,GPU-x,0", ["GPU-8a00"]),
        ("MIG-1-0", []),
    ],
)
def test_what_a_process_sees_of_three_gpus(names: str | None, visible: list[str]):
    environ = {} if names is None else {"CUDA_VISIBLE_DEVICES": names}
    assert [gpu.uuid for gpu in visible_gpus(environ, FakeNvml([0, 0, 0], uuids=UUIDS))] == visible


@pytest.mark.parametrize(
    ("names", "visible"),
    [
        (None, ["GPU-0", "MIG-1-0"]),
        ("1", ["MIG-1-0"]),
        ("GPU-1", ["MIG-1-0"]),
        ("MIG-1-1", ["MIG-1-1"]),
        ("MIG-1-1,MIG-1-0", ["MIG-1-1", "MIG-1-0"]),
        ("2", []),
        ("2,0", []),
    ],
)
def test_what_a_process_sees_of_slices(names: str | None, visible: list[str]):
    nvml = FakeNvml([0, 0, 0], slices={1: 2, 2: 0})
    environ = {} if names is None else {"CUDA_VISIBLE_DEVICES": names}
    assert [gpu.uuid for gpu in visible_gpus(environ, nvml)] == visible


def place(monkeypatch: pytest.MonkeyPatch, names: str, nvml: FakeNvml) -> Place:
    monkeypatch.setattr(module, "visible_gpus", lambda: visible_gpus({"CUDA_VISIBLE_DEVICES": names}, nvml))
    return this_place(uses_gpu=True)


def test_a_process_is_where_the_first_gpu_is_that_it_sees(monkeypatch: pytest.MonkeyPatch):
    whole = place(monkeypatch, "1,0", FakeNvml([0, 0]))
    assert (whole.gpus, whole.sliced) == ("GPU-1", False)
    sliced = place(monkeypatch, "MIG-1-1", FakeNvml([0, 0], slices={1: 2}))
    assert (sliced.gpus, sliced.sliced) == ("GPU-1", True)
    assert place(monkeypatch, "", FakeNvml([0, 0])).gpus == ""
    assert this_place(uses_gpu=False) == Place(whole.node)


def test_ranks_are_where_each_of_them_is():
    places = [Place("n", "GPU-1"), Place("n", "GPU-0"), Place("n", "GPU-1", sliced=True)]
    assert Place.of_all(places) == Place("n", "GPU-1,GPU-0", sliced=True)
    assert Place.of_all([Place("n"), Place("n")]) == Place("n")


def torch_of(folder: Path, version: str, cuda: str | None, hip: str | None = None) -> Path:
    """The file that a wheel of torch says in what it was built for."""
    (folder / "version.py").write_text(
        "from typing import Optional\n\n__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']\n"
        f"__version__ = {version!r}\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
        f"git_version = 'cf30153c'\nhip: Optional[str] = {hip!r}\n"
    )
    return folder


@pytest.mark.parametrize(
    ("cuda", "driver", "fault"),
    [
        (None, 13000, "torch 2.13.0 is built without CUDA"),
        ("13.0", 12040, "torch 2.13.0 is built for CUDA 13.0, and the driver has 12.4"),
        ("13.0", 13000, ""),
        ("12.8", 13000, ""),
        ("12.8", 12020, ""),  # of one major version
    ],
)
def test_torch_computes_on_gpus_if_it_is_built_for_the_drivers_cuda(
    tmp_path: Path, cuda: str | None, driver: int, fault: str
):
    nvml = FakeNvml([0], cuda=driver)
    assert cuda_fault(nvml, torch_of(tmp_path, "2.13.0", cuda)) == fault
    assert nvml.open == 0


def test_a_torch_for_gpus_of_another_make_is_left_to_itself(tmp_path: Path):
    assert cuda_fault(FakeNvml(driver=False), torch_of(tmp_path, "2.13.0", None, hip="6.4")) == ""


def test_without_a_driver_nothing_computes_on_gpus(tmp_path: Path):
    assert "no NVIDIA driver" in cuda_fault(FakeNvml(driver=False), torch_of(tmp_path, "2.13.0", "13.0"))


def test_the_torch_that_is_installed_is_read_without_importing_it():
    import torch

    nvml = FakeNvml([0], cuda=99000)
    assert (cuda_fault(nvml) == "") is (torch.version.cuda is not None)
