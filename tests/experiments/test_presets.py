from pathlib import Path

import pytest

from semcons_ray.studies.comparison import load_comparison, plan_runs

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PRESETS = sorted([*EXPERIMENTS.glob("ablations/*.yaml"), *EXPERIMENTS.glob("quality/*.yaml")])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_run_of_a_preset_is_valid_with_three_seeds_or_more(path: Path, tmp_path: Path) -> None:
    comparison = load_comparison(path)
    runs = plan_runs(comparison, tmp_path)
    assert len(runs) == len(comparison.seeds) * len(comparison.arms)
    assert len(comparison.seeds) >= 3
    assert {comparison.reference, comparison.baseline} <= comparison.arms.keys()
