"""What a trial of a sweep reserves, and how many go on at once."""

from dataclasses import replace

import pytest

from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.distributed.placement import GIB, Node, packed
from semcons_ray.errors import PlacementError
from semcons_ray.studies.search_space import SweepConfig
from semcons_ray.studies.sweep import _at_once, _Room

FAULT = "torch 2.13.0+cpu is built without CUDA"


def node(gpus: int = 0, cpus: float = 8, fault: str = "") -> Node:
    return Node("n", "n", cpus, (1.0,) * gpus, 64 * GIB, cuda_fault=fault)


def config(clients: int = 20, **resources: object) -> ExperimentConfig:
    return validate_config({"clients": {"num_clients": clients}, "resources": resources}, where="test")


def bundles(config: ExperimentConfig, *nodes: Node) -> list[dict[str, float]]:
    """Without the empty one of the trial's own process."""
    return _Room(nodes).reserve(config).bundles


@pytest.mark.parametrize(("share", "workers"), [(1.0, 2), (0.6, 2), (0.5, 4), (0.4, 4), (0.3, 6), (1 / 6, 12)])
def test_a_trial_reserves_as_many_shares_as_gpus_hold_one_by_one(share: float, workers: int) -> None:
    found = bundles(config(gpus_per_worker=share), node(2))
    assert len(found) == workers
    assert {bundle["GPU"] for bundle in found} == {int(share * 10_000) / 10_000}


def test_the_server_has_a_bundle_of_its_own_before_the_workers() -> None:
    """In a worker's it would come to 1.1 GPUs, of which there is no such thing; beside it there is room for one."""
    assert bundles(config(gpus_per_worker=0.6, server_gpus=0.5), node(2)) == [{"GPU": 0.5}, {"GPU": 0.6}]


def test_clients_and_settings_limit_what_is_reserved() -> None:
    assert len(bundles(config(clients=3, gpus_per_worker=0.25), node(2))) == 3
    assert len(bundles(config(gpus_per_worker=0.25, max_workers=5), node(2))) == 5
    assert bundles(config(threads_per_worker=3), node(), node()) == [{"CPU": 3}] * 4
    assert bundles(config(threads_per_worker=9), node()) == [{"CPU": 9}]


def test_gpus_that_torch_cannot_use_are_not_reserved() -> None:
    assert bundles(config(), node(4, cpus=2, fault=FAULT)) == [{"CPU": 1}] * 2
    assert len(bundles(config(), replace(node(4), cuda_fault=FAULT), node(3))) == 3
    assert bundles(config(device="cpu"), node(4, cpus=2)) == [{"CPU": 1}] * 2


def test_a_trial_in_one_process_reserves_its_share_of_one_gpu() -> None:
    local = {"fleet": "local", "gpus_per_worker": 0.5, "server_gpus": 0.25}
    assert bundles(config(**local), node(2)) == [{"CPU": 1, "GPU": 0.75}]
    assert bundles(config(**local), node()) == [{"CPU": 1}]


def start_trials(config: ExperimentConfig, nodes: list[Node]) -> tuple[int, int]:
    """How many trials find room at once, given bundle by bundle; and how many GPUs then have something to do."""
    left, count = [node.gpus for node in nodes], 0
    while True:
        tried = [*left]
        for bundle in bundles(config, *nodes):
            room = (packed(gpus, [bundle["GPU"]]) for gpus in tried)
            found = [(index, gpus) for index, gpus in enumerate(room) if gpus is not None]
            if not found:
                return count, sum(gpu < 1 for gpus in left for gpu in gpus)
            tried[found[0][0]] = found[0][1]
        left, count = tried, count + 1


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize(
    ("workers", "engine", "share", "server", "trials"),
    [
        (1, "transformers", 1.0, 0.0, 64),
        (4, "transformers", 1.0, 0.0, 16),
        (8, "transformers", 1.0, 0.0, 8),
        (8, "transformers", 0.5, 0.0, 16),
        (4, "transformers", 0.5, 0.5, 25),  # in 62.5 GPUs; the rest holds no trial
        (1, "vllm", 0.5, 0.0, 64),  # and the engine the other half
        (1, "vllm", 0.25, 0.25, 64),
    ],
)
def test_a_sweep_keeps_64_gpus_busy(
    workers: int, engine: str, share: float, server: float, trials: int, gpus: int
) -> None:
    values = {
        "clients": {"num_clients": 20},
        "generation": {"engine": engine},
        "resources": {
            **({"fleet": "local", "engine_gpus": 0.5} if engine == "vllm" else {"max_workers": workers}),
            **{"gpus_per_worker": share, "server_gpus": server, "device": "cuda"},
        },
    }
    sweep = SweepConfig.model_validate({"experiment": values, "space": {"prompts.budget": {"grid": [*range(1, 129)]}}})
    trial = sweep.configure(sweep.first())
    assert _at_once(sweep, trial) is None  # Tune starts as many as find room
    assert start_trials(trial, [node(gpus)] * (64 // gpus)) == (trials, 63 if trials == 25 else 64)


@pytest.mark.parametrize(
    "resources",
    [{"gpus_per_worker": 1.0, "server_gpus": 0.25}, {"fleet": "local", "gpus_per_worker": 1.0, "server_gpus": 0.25}],
)
def test_a_trial_that_would_wait_for_ever_is_refused(resources: dict[str, object]) -> None:
    with pytest.raises(PlacementError, match=r"resources\.server_gpus.*lower them"):
        bundles(config(**resources), node(1))


@pytest.mark.parametrize(
    ("wanted", "exclusive", "at_once"), [(3, False, 3), (None, False, None), (3, True, 1), (None, True, 1)]
)
def test_trials_go_on_side_by_side_unless_each_is_to_have_the_meters(
    wanted: int | None, exclusive: bool, at_once: int | None
) -> None:
    sweep = SweepConfig.model_validate(
        {"space": {"prompts.budget": {"grid": [4, 6]}}, "max_concurrent_trials": wanted,
         "experiment": {"energy": {"exclusive": exclusive}}}
    )  # fmt: skip
    assert _at_once(sweep, sweep.configure(sweep.first())) == at_once
