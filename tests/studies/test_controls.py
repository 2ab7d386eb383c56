"""A control differs from its arm in one setting, as resolved; and an arm is the same run however it is started."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from semcons_ray.config import ExperimentConfig
from semcons_ray.runs.experiment import run_experiment
from semcons_ray.studies.comparison import ComparisonConfig, load_comparison, plan_runs, run_comparison
from semcons_ray.studies.search_space import load_sweep
from semcons_ray.studies.sweep import run_sweep

MakeConfig = Callable[..., ExperimentConfig]

PRESETS = Path(__file__).parents[2] / "experiments" / "quality"

CONTROL_OF = {
    "random client": "semantic consensus",
    "longest answer": "semantic consensus",
    "shortest answer": "semantic consensus",
    "reference answers": "semantic consensus",
    "self-training": "semantic consensus",
    "FedAvg-LoRA + own labels": "FedAvg-LoRA",
    "local only, not averaged": "local only",
    "local only, averaged": "local only",
    "consensus, 144 prompts": "consensus, 288 prompts",
    "consensus from round 1 on": "semantic consensus",
    "from round 1 on": "from round 2 on",
}
ALGORITHMS = {"FedProx", "SCAFFOLD", "FFA-LoRA", "FLoRA", "FlexLoRA", "HetLoRA", "one-shot FedAvg-LoRA", "centralized"}


def differing(one: dict[str, Any], other: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in one.items():
        if isinstance(value, dict) and isinstance(other[key], dict):
            yield from differing(value, other[key], f"{above}{key}.")
        elif value != other[key]:
            yield above + key


def resolved(comparison: ComparisonConfig) -> dict[str, dict[str, Any]]:
    return {
        run.arm: run.config.model_dump(exclude={"name"})
        for run in plan_runs(comparison, Path("out"))
        if run.seed == comparison.seeds[0]
    }


@pytest.mark.parametrize("preset", [None, *(path.stem for path in sorted(PRESETS.glob("*.yaml")))])
def test_every_control_differs_from_its_arm_in_exactly_one_setting(preset: str | None) -> None:
    arms = resolved(load_comparison(preset and PRESETS / f"{preset}.yaml"))
    assert set(arms) <= {*CONTROL_OF, *CONTROL_OF.values(), *ALGORITHMS, "FedAvg-LoRA", "local only"}
    controls = set(arms) & set(CONTROL_OF)
    assert controls
    for control in controls:
        changed = [*differing(arms[control], arms[CONTROL_OF[control]])]
        assert len(changed) == 1, (control, changed)
    for name in set(arms) & ALGORITHMS:  # algorithms are compared with one another, and differ in name alone
        assert [*differing(arms[name], arms["FedAvg-LoRA"])] == ["algorithm.name"]


def adapters(run: Path) -> dict[str, bytes]:
    files = sorted(run.glob("adapters/*/adapter_model.safetensors"))
    assert files
    return {path.parent.name: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.ray
def test_an_arm_has_the_same_bits_through_run_compare_and_sweep(tiny_config: MakeConfig, tmp_path: Path) -> None:
    names = ["semantic_consensus", "scaffold"]
    values = tiny_config().model_dump(mode="json", exclude_defaults=True)
    for name in names:
        run_experiment(tiny_config(algorithm={"name": name}), tmp_path / name)
    arms = {name: {"algorithm": {"name": name}} for name in names}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({"seeds": [0], "experiment": values, "arms": arms}))
    assert run_comparison(load_comparison(tmp_path / "compare.yaml"), tmp_path / "compared", print)[1] == 0
    space = {"algorithm.name": {"grid": names}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"experiment": values, "space": space}))
    assert run_sweep(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "swept", print)[1] == 0
    for name in names:
        alone = adapters(tmp_path / name)
        assert adapters(tmp_path / "compared" / "runs" / name / "seed_0") == alone
        [trial] = tmp_path.glob(f"swept/trials/name-{name}-*")
        assert adapters(trial) == alone
