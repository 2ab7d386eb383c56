"""Runs that are measured by more than the default metrics, and what they need."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, LoraConfig, MetricName
from semcons_ray.errors import ConfigError
from semcons_ray.evaluation.scores import exact_match
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.reporting import read_run, render_result
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent
from tests.tiny import NUMBERS

pytestmark = [pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]
METRICS: list[MetricName] = ["exact_match", "numeric_match", "chrF", "multiple_choice"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Additions with three options each."""
    path = tmp_path_factory.mktemp("data") / "options.jsonl"
    rows = [
        {
            "question": f"add {NUMBERS[i]} and {NUMBERS[j]}",
            "options": [str(i + j + k) for k in (1, 0, 12)],
            "answer": "B",
        }
        for i in range(12)
        for j in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tiny_config: MakeConfig, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    config = tiny_config(data={"source": str(questions), "partition": "iid"}, evaluation={"metrics": METRICS})
    run_experiment(config, out, Silent())
    return out


def test_each_metric_is_a_column_and_a_mean_of_items(run: Path) -> None:
    metrics = pd.read_parquet(run / "metrics.parquet")
    named = ["exact_match", "numeric_match", "chrF", "multiple_choice", "multiple_choice_norm"]
    assert metrics.columns[-5:].tolist() == named
    assert metrics[["rouge_l", "similarity"]].isna().all(axis=None)
    for round in (0, 1, 2):
        items = pd.read_parquet(run / f"items/round_{round:03d}.parquet")
        assert len(items) == 3 * 6
        for client, rows in items.groupby("client_id"):
            row = metrics[(metrics["round"] == round) & (metrics["client_id"] == client)].iloc[0]
            assert row["nll"] == pytest.approx(rows["nats"].sum() / rows["num_tokens"].sum())
            assert rows["answer"].notna().tolist() == [True] * 3 + [False] * 3
            for name in named:
                assert row[name] == pytest.approx(rows[name].mean())
    ledger = pd.read_parquet(run / "ledger.parquet")
    assert ledger[(ledger["worker"] == "server") & (ledger["stage"] == "evaluate")].empty  # nothing was embedded for it


def test_items_are_what_the_model_makes_of_them(run: Path) -> None:
    read = read_run(run)
    model = LanguageModel(read.config["model"]["name"], lora=LoraConfig(), dtype="float32", device="cpu", max_length=64)
    test = read.data[read.data["role"] == "test"]
    data = pd.read_parquet(run / "data.parquet")
    options = data.loc[data["role"] == "test", "options"].map(list).tolist()
    items = pd.read_parquet(run / "items/round_000.parquet")
    base = items[items["client_id"] == 0]
    scored, _ = model.option_nll(model.fresh_adapter(), list(zip(test["prompt"], options, strict=True)), 4)
    assert [list(one) for one in base["option_nll"]] == [pytest.approx(one) for one in scored]
    right = [int(min(range(3), key=one.__getitem__) == 1) for one in scored]
    assert base["multiple_choice"].tolist() == right
    answered = base["answer"].dropna()
    assert base["exact_match"].mean() == fmean(map(exact_match, answered, test["response"][: len(answered)]))


def test_the_report_has_them_with_intervals(run: Path) -> None:
    text = render_result(read_run(run), 140)
    for label in ("NLL", "bits/byte", "exact match", "numeric match", "chrF", "accuracy", "accuracy, by length"):
        assert f"\n{label} " in text
    assert "ROUGE-L  " not in text.split("mean over clients")[1]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("multiple_choice", r"^evaluation\.metrics multiple_choice needs options, .* data\.columns"),
        ("numeric_match", r"^evaluation\.metrics numeric_match needs references with numbers, and none of the first 3"),
    ],
)
def test_a_metric_that_the_data_has_nothing_for_is_refused_before_work_begins(
    tiny_config: MakeConfig, tmp_path: Path, metric: MetricName, says: str
) -> None:
    path = tmp_path / "words.jsonl"
    rows = [{"prompt": f"spell {one} {other}", "response": "words"} for one in NUMBERS for other in NUMBERS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(data={"source": str(path), "partition": "iid"}, evaluation={"metrics": [metric]})
    with pytest.raises(ConfigError, match=says):
        run_experiment(config, tmp_path / "out", Silent())
    assert not (tmp_path / "out" / "placement.json").exists()


def test_without_lm_eval_one_line_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(run), "--tasks", "arc_easy"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("semcons: --tasks needs lm-eval (")
    assert "pip install --no-deps -r requirements-lm-eval.lock" in said
