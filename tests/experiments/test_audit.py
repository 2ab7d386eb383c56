from pathlib import Path

import pandas as pd
import pytest

from semcons_ray.studies.comparison import load_comparison, plan_runs
from tests.experiments.scripts import load_script
from tests.security.letters import embed

audit = load_script("audit")
HERE = Path(__file__).parents[2] / "experiments"


def test_arms_have_the_same_canaries(tmp_path: Path) -> None:
    runs = plan_runs(load_comparison(HERE / "audit" / "canaries.yaml"), tmp_path)
    assert {run.config.algorithm.name for run in runs} == {"semantic_consensus", "fedavg_lora"}
    assert len({(run.config.data.canaries, run.config.seed) for run in runs}) == len(runs) / 2
    assert all(run.config.data.canaries for run in runs)


@pytest.mark.real
def test_no_text_that_clients_answer_with_is_in_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)
    data, others = audit.parts(audit.SKILLS)
    assert not {one.prompt for one in data.examples} & {one.prompt for one in others.examples}
    assert abs(len(data.examples) - len(others.examples)) <= 1


@pytest.mark.real
def test_a_planted_leak_is_noticed_and_its_absence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)
    data, others = audit.parts(audit.SKILLS)
    texts = [f"it is {one.response}" for one in others.examples]
    leak = audit.audited(data, texts, 0.2, 0, embed, whole=True)
    assert (leak["leak_noticed"], leak["false_alarm"]) == (True, False)
    clean = audit.audited(data, texts, 0.0, 0, embed, whole=True)
    assert (clean["leak_noticed"], clean["false_alarm"]) == (False, False)


def test_the_summary_counts_runs() -> None:
    table = pd.DataFrame(
        {"condition": "c", "rate": [0.0, 0.0, 0.1], "p_adjusted": [0.5, 0.001, 0.002],
         "leak_noticed": [False, False, True], "false_alarm": [False, True, False]}
    )  # fmt: skip
    rows = audit.summary(table).set_index("rate")
    assert rows.loc[0.0, ["leak_noticed", "false_alarm", "runs"]].tolist() == [0, 1, 2]
    assert rows.loc[0.1, ["leak_noticed", "false_alarm", "runs"]].tolist() == [1, 0, 1]
    assert rows.loc[0.0, "median_p_adjusted"] == 0.2505
