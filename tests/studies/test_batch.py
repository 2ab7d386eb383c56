"""Which process of many runs gets which GPU."""

import os
import time
from pathlib import Path

import pytest

from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.data.losses import REPEATED, Tally
from semcons_ray.errors import RunFolderError
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.batch import Job, gpu_share, plan_processes, start_processes, warn_of_losses

GPUS = ["GPU-a", "GPU-b"]


def config(device: str = "auto", *, exclusive: bool = False, **sections: object) -> ExperimentConfig:
    resources = {"fleet": "local", "device": device, **sections.pop("resources", {})}  # type: ignore[dict-item]
    values = {"resources": resources, "energy": {"exclusive": exclusive}, **sections}
    return validate_config(values, where="test")


def share(gpus: float, **more: object) -> ExperimentConfig:
    return config(resources={"gpus_per_worker": gpus, **more})


@pytest.mark.parametrize(
    ("configs", "places"),
    [
        ([share(1.0)] * 5, ["GPU-a", "GPU-b"]),
        ([share(0.5)] * 5, ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]),
        ([share(0.5)] * 3, ["GPU-a", "GPU-b", "GPU-a"]),
        ([share(0.6)] * 5, ["GPU-a", "GPU-b"]),
        ([share(1 / 3)] * 9, ["GPU-a", "GPU-b"] * 3),
        ([share(0.25, server_gpus=0.25)] * 9, ["GPU-a", "GPU-b"] * 2),
        ([share(0.2), share(0.5)] * 5, ["GPU-a", "GPU-b"] * 2),  # the largest must fit wherever it comes to be
        ([share(1.0, server_gpus=0.5)] * 2, ["GPU-a", "GPU-b"]),  # the runs themselves refuse that
        ([config("cuda")], ["GPU-a"]),
        ([config("cuda", exclusive=True)] * 5, ["GPU-a"]),
        ([config("cpu")] * 9, [""] * 4),
        ([config("cpu"), share(1.0)] * 2, ["GPU-a", "GPU-b"]),
    ],
)
def test_gpus_are_dealt_out_in_turn_as_far_as_shares_go(configs: list[ExperimentConfig], places: list[str]) -> None:
    assert plan_processes(configs, GPUS, cpus=4) == places


@pytest.mark.parametrize(
    ("configs", "cpus", "count"),
    [
        ([config()] * 9, 4, 4),
        ([config()] * 3, 4, 3),
        ([config("cuda")] * 3, 4, 3),
        ([config()] * 3, 0, 1),
        ([config(exclusive=True)] * 9, 4, 1),
        ([config(), config(exclusive=True)], 4, 1),
        ([], 4, 1),
    ],
)
def test_without_gpus_there_are_as_many_processes_as_cores_allow(
    configs: list[ExperimentConfig], cpus: int, count: int
) -> None:
    assert plan_processes(configs, [], cpus) == [""] * count


def test_a_process_has_the_shares_of_all_that_is_in_it() -> None:
    assert gpu_share(share(0.5, server_gpus=0.1)) == 0.6
    mixed = config(
        resources={"gpus_per_worker": 0.2, "engine_gpus": 0.3},
        generation={"engine": "vllm"},
        clients={"num_clients": 4, "mix": {"a": 1, "b": 1}},
    )
    assert gpu_share(mixed) == 0.8


def seen(folder: Path) -> tuple[str | None, str]:
    """What a process sees, when there are three that see something."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]


def test_every_process_sees_the_gpu_that_it_was_dealt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with start_processes(["GPU-a", "GPU-b", ""], threads=1) as pool:
        found = list(pool.map(seen, [tmp_path] * 3))
    assert sorted(found) == [("0,1", "1"), ("GPU-a", "1"), ("GPU-b", "1")]


def test_how_energy_is_metered_is_no_other_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", config())
    Job(config(exclusive=True, resources={"max_workers": 2}), tmp_path / "run").check_settings()
    with pytest.raises(RunFolderError, match="num_rounds"):
        Job(config(num_rounds=9), tmp_path / "run").check_settings()


def test_a_loss_of_data_that_runs_share_is_warned_of_once(tmp_path: Path) -> None:
    said: set[str] = set()
    lines: list[str] = []
    for name, lost in (("a", 1), ("b", 2), ("c", 2)):
        folder = RunFolder.create(tmp_path / name, ExperimentConfig())
        folder.write_tallies([Tally.of("data.source x.csv", "rows left out", 100, {REPEATED: lost})])
        warn_of_losses(folder.path, said, lines.append)
    assert lines == ["warning: data.source x.csv: 2 of 100 rows left out (2 with the prompt of an earlier row)"]
