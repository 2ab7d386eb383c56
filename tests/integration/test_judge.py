"""Runs whose answers are judged by a model behind an endpoint."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.reporting import read_run, write_report
from semcons_ray.reporting.tables import metric_table
from semcons_ray.runs.experiment import run_experiment
from tests.endpoints.server import Server, serving
from tests.invariants.runs import Silent

pytestmark = [pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]
KEY = "sk-test-0a1b2c3d4e5f6g7h8i9j"


def judged(make: MakeConfig, url: str) -> ExperimentConfig:
    options = {"model": "small", "base_url": url, "api_key_env": "SEMCONS_TEST_KEY", "usd_per_million_output_tokens": 9}
    return make(evaluation={"metrics": ["rouge_l", "judge"], "judge": options}, algorithm={"name": "local_only"})


def test_opinions_are_columns_items_ledger_rows_and_in_the_report(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMCONS_TEST_KEY", KEY)
    with serving(Server(lambda body: "A", key=KEY)) as server:
        run_experiment(judged(tiny_config, server.url), tmp_path / "run", Silent())
        asked = len(server.asked)
    run = tmp_path / "run"
    items = pd.concat(pd.read_parquet(path) for path in sorted((run / "items").iterdir()))
    given = items[items["answer"].fillna("") != ""]
    assert set(given["judge"]) == {0.5}
    assert set(given["judge_agreement"]) == {0.0}
    metrics = pd.read_parquet(run / "metrics.parquet")
    measured = items.groupby("client_id")["judge"].mean()
    assert metrics.groupby("client_id")["judge"].mean().tolist() == pytest.approx(measured.tolist())
    ledger = pd.read_parquet(run / "ledger.parquet")
    rows = ledger[(ledger["worker"] == "judge") & (ledger["stage"] == "evaluate")]
    assert rows["tokens"].sum() == 15 * asked > 0
    assert rows["cost_usd"].sum() == pytest.approx(45e-6 * asked)
    assert set(rows["energy_source"]) == {"unavailable"}
    table = metric_table(read_run(run))
    assert {"judge", "judge_agreement"} <= set(table.index)
    assert "judge agrees with itself" in write_report(run).read_text()
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_missing_key_is_told_before_work_begins(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(judged(tiny_config, "http://127.0.0.1:1/v1")))
    environment = {name: value for name, value in os.environ.items() if name != "SEMCONS_TEST_KEY"}
    for command in (["run", str(config), "--out", str(tmp_path / "run")], ["run", str(config), "--dry-run"]):
        whole = [sys.executable, "-m", "semcons_ray.commands.cli", *command]
        done = subprocess.run(whole, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        said = "the environment variable SEMCONS_TEST_KEY is not set, which evaluation.judge.api_key_env names"
        assert said in done.stderr
    assert not (tmp_path / "run" / "data.parquet").exists()
