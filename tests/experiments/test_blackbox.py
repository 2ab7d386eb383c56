from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from semcons_ray.studies.comparison import load_comparison, plan_runs
from tests.experiments.scripts import load_script

blackbox = load_script("blackbox")
HERE = Path(__file__).parents[2] / "experiments"


def test_every_run_has_three_models_that_are_trained_and_two_that_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parent)
    comparison = load_comparison(HERE / "blackbox" / "black_box.yaml")
    assert len(comparison.seeds) >= 3
    for run in plan_runs(comparison, tmp_path):
        assert [model for model in run.config.client_models() if model in run.config.clients.models] == [
            "closed-0.5b",
            "closed-135m",
        ]


def test_the_gain_of_a_client_is_paired_by_seed() -> None:
    table = pd.DataFrame(
        {"seed": [0, 1], "client_id": 3, "model": "m", "base": 0.0, "first": [0.1, 0.3], "last": [0.2, 0.6],
         "votes_won": [0.5, 0.1]}
    )  # fmt: skip
    row = blackbox.summary(table).iloc[0]
    assert row["gain"] == pytest.approx(0.2)
    # t(0.975, 1) = 12.706; the gains are 0.1 and 0.3, whose standard error is 0.1.
    assert row["half_width"] == pytest.approx(1.2706, abs=1e-4)
    assert row["votes_won"] == pytest.approx(0.3)


def test_labels_are_right_if_they_are_what_the_data_has() -> None:
    data = pd.DataFrame({"role": ["test", "public", "public"], "response": ["9", "4", "6"]})
    votes = [(1, 0, 0, "4 ", True), (1, 0, 1, "5", False), (1, 1, 0, "7", True), (1, 1, 1, "6", False)]
    consensus = pd.DataFrame(votes, columns=["round", "prompt_id", "client_id", "answer", "chosen"])
    table = blackbox.labels([SimpleNamespace(config={"seed": 3}, data=data, consensus=consensus)])
    assert table.to_dict("records") == [{"seed": 3, "round": 1, "labels": 0.5, "client_0": 0.5, "client_1": 0.5}]


def test_the_skills_are_questions_with_one_answer() -> None:
    for path in (HERE / "skills").glob("*.jsonl"):
        rows = pd.read_json(path, lines=True, dtype=str)
        assert len(rows) >= 100
        assert rows["prompt"].is_unique
        assert set(rows["category"]) == {path.stem}
        assert rows["response"].str.fullmatch(r"-?\d+").all()
