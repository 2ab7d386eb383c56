"""Runs and their results by the Python API: what is asked for comes from the folder, and what is not there is named."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.api.places import new_folder
from semcons_ray.commands.cli import main
from semcons_ray.config import dump_config, dump_yaml
from semcons_ray.federation.server import ServerState
from semcons_ray.messages import PseudoLabels
from semcons_ray.reporting.tables import mean_by_round
from tests.invariants.runs import StoppedError

pytestmark = pytest.mark.real

Make = Callable[..., sr.ExperimentConfig]


class Stops(sr.Observer):
    """Ends the process's run after a round, as a kill would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round_ends(self, commit: sr.Commit) -> None:
        if commit.summary.round == self.after:
            raise StoppedError


@pytest.fixture(scope="module")
def run(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> sr.Run:
    config = tiny_config(name="one <b>", num_rounds=3, evaluation={"metrics": ["nll", "exact_match"]},
                         algorithm={"first_exchange": 1})  # fmt: skip
    return sr.run(config, out=tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def stopped(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> sr.Run:
    path = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(StoppedError) as raised:
        sr.run(tiny_config(), out=path, observers=[Stops(1)])
    assert raised.value.__notes__ == [f"The run's folder is {path}; semcons_ray.resume({str(path)!r}) goes on with it."]
    return sr.load(path)  # type: ignore[return-value]


def test_a_run_has_its_tables_and_says_what_is_in_their_columns(run: sr.Run) -> None:
    assert run.finished
    assert run.config.num_rounds == 3
    for name in ("metrics", "rounds", "ledger"):
        frame = getattr(run, name)
        pd.testing.assert_frame_equal(frame, pd.read_parquet(run.path / f"{name}.parquet"), check_dtype=False)
        documented = set(re.findall(r"\w+", str(getattr(sr.Run, name).__doc__)))
        assert set(frame.columns) - {"exact_match"} <= documented, name
    for name, frame in (("items", run.items(3)), ("answers", run.answers(1)), ("labels", run.labels(1))):
        assert len(frame)
        documented = set(re.findall(r"\w+", str(getattr(sr.Run, name).__doc__)))
        assert set(frame.columns) - {"exact_match"} <= documented, name
    assert run.scores.empty


def test_labels_are_those_that_clients_were_sent(run: sr.Run, tiny_config: Make, tmp_path: Path) -> None:
    for one in (run, sr.run(tiny_config(algorithm={"rule": "reference"}), out=tmp_path / "reference")):
        last = one.config.num_rounds - 1  # in the last round nobody answers
        sent = PseudoLabels.decode(ServerState.decode((one.path / f"state/server_{last:03d}").read_bytes()).labels)
        labels = one.labels(last)
        assert tuple(labels["prompt_id"]) == sent.prompt_ids
        assert tuple(labels["label"]) == sent.responses
        public = pd.read_parquet(one.path / "data.parquet").query("role == 'public'")
        assert list(labels["prompt"]) == [public["prompt"].iloc[prompt] for prompt in sent.prompt_ids]
    assert set(labels["client_id"]) == {-1}
    assert set(run.labels(2)["client_id"]) <= {0, 1, 2}


def test_a_round_without_what_is_asked_for_is_named(run: sr.Run) -> None:
    with pytest.raises(sr.UserError, match=r"no consensus was formed in round 3, but in rounds 1, 2$"):
        run.labels(3)
    with pytest.raises(sr.UserError, match=r"no client was measured in round 9, but in rounds 0, 1, 2, 3$"):
        run.items(9)


def test_adapters_are_folders_for_peft(run: sr.Run, stopped: sr.Run) -> None:
    assert (run.adapter(2) / "adapter_model.safetensors").is_file()
    with pytest.raises(sr.UserError, match="no adapter of client 7; there are client_000, client_001, client_002"):
        run.adapter(7)
    with pytest.raises(sr.UserError, match=r"is not finished, so it has no adapters; semcons_ray\.resume goes on"):
        stopped.adapter(0)


def test_the_reports_tables_are_data_frames_with_documented_columns(run: sr.Run) -> None:
    tables = run.report()
    text = str(sr.Run.report.__doc__)
    assert list(tables) == ["clients", "metrics", "tasks", "stages", "bytes", "agreement"]
    assert all(name in text for name in tables)
    assert run.report_html.is_file()
    exact = tables["metrics"].loc["exact_match"]
    assert exact["base_low"] <= exact["base"] <= exact["base_high"]
    total = tables["bytes"]["total_bytes"].sum()
    assert total == run.ledger["uplink_bytes"].sum() + run.ledger["downlink_bytes"].sum()


def test_a_run_is_one_line_a_table_or_a_piece_of_html(
    run: sr.Run, stopped: sr.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repr(run) == f"<semcons_ray.Run '{run.path}': finished>"
    assert repr(stopped) == f"<semcons_ray.Run '{stopped.path}': 1 of 2 rounds>"
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run}\n\nreport: {run.report_html}\n"
    html = run._repr_html_()
    assert "one &lt;b&gt;: 3 of 3 rounds" in html
    assert html.count("<svg") == html.count("<table") == 1
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', html) == []
    assert f"{mean_by_round(run.metrics, 'nll').iloc[-1]:.3f}" in html


def test_a_run_that_goes_on_can_be_read_and_is_resumed(stopped: sr.Run, tmp_path: Path) -> None:
    assert not stopped.finished
    assert list(stopped.rounds["round"]) == [0, 1]
    shutil.copytree(stopped.path, tmp_path / "copy")
    done = sr.resume(tmp_path / "copy")
    assert done.finished
    assert list(done.rounds["round"]) == [0, 1, 2]


def test_a_damaged_or_missing_file_is_named(run: sr.Run, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(run.path, path)
    (path / "metrics.parquet/round_000001.parquet").write_bytes(b"PAR1")
    shutil.rmtree(path / "rounds.parquet")
    (path / "consensus/round_001.parquet").write_bytes(b"")
    found = sr.load(path)
    assert isinstance(found, sr.Run)
    for broken, name in (
        (lambda: found.metrics, "metrics.parquet cannot be read"),
        (lambda: found.rounds, "rounds.parquet is missing"),
        (lambda: found.answers(1), "round_001.parquet cannot be read"),
        (lambda: str(found), "rounds.parquet is missing"),
    ):
        with pytest.raises(sr.RunFolderError, match=name):
            broken()
    with pytest.raises(sr.RunFolderError, match="is not a folder"):
        sr.load(tmp_path / "nowhere")


def test_settings_come_from_mappings_files_and_configs_laid_over_each_other(tiny_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config()))
    more = tmp_path / "more.yaml"
    more.write_text("seed: 7\nalgorithm: {name: local_only}\n")
    for source in (
        [path, more, {"num_rounds": 1}],
        [tiny_config(), str(more), {"num_rounds": 1}],
        tiny_config(seed=7, num_rounds=1, algorithm={"name": "local_only"}),
    ):
        planned = sr.plan(source)
        assert list(planned.table.index) == ["base model", "round 1", "total"]
        assert planned.table["uplink_bytes"].sum() == 0
        assert planned.table.loc["total", "trained"] > 0
        assert planned.seconds > 0
        assert "seed: 7" in str(planned)
    with pytest.raises(sr.ConfigError, match="the settings given: unknown setting 'num_round'"):
        sr.run({"num_round": 1})
    with pytest.raises(sr.ConfigError, match="read from a path, a mapping or an ExperimentConfig, not from 3"):
        sr.run([3])  # type: ignore[list-item]


def test_a_dry_run_looks_whether_the_folder_is_free(run: sr.Run) -> None:
    with pytest.raises(sr.RunFolderError, match="holds a run"):
        sr.plan(out=run.path)
    with pytest.raises(sr.RunFolderError, match="holds a run"):
        sr.run(out=run.path)


def test_without_a_place_a_run_has_a_folder_of_its_own(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("semcons_ray.api.places.time", SimpleNamespace(strftime=lambda form: "20260102-030405"))
    taken = new_folder("A b/c")
    taken.mkdir(parents=True)
    assert str(taken) == "runs/A-b-c-20260102-030405"
    assert str(sr.run(tiny_config(name="A b/c", num_rounds=1)).path) == "runs/A-b-c-20260102-030405-2"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("semcons_ray.runs.remote_folder.cache_dir", lambda: tmp_path / "cache")
    yield "memory://bucket/first"
    fsspec.filesystem("memory").store.clear()


def test_a_run_at_a_url_is_run_read_and_reported_there(url: str, tiny_config: Make, tmp_path: Path) -> None:
    first = sr.run(tiny_config(num_rounds=1), out=url)
    store = fsspec.filesystem("memory")
    assert store.exists("/bucket/first/report.html")
    shutil.rmtree(tmp_path / "cache")
    found = sr.load(url)
    assert isinstance(found, sr.Run)
    assert found.path == first.path
    assert found.finished
    store.rm("/bucket/first/report.html")
    found.report_html.unlink()
    found.write_report()
    assert store.exists("/bucket/first/report.html")
    with pytest.raises(sr.RunFolderError, match=f"^{url} is not empty; choose another --out"):
        sr.compare(out=url)
    with pytest.raises(sr.RunFolderError, match="is a URL; only runs, comparisons and sweeps are kept at one"):
        sr.watch(url)


@pytest.mark.slow
def test_a_comparison_has_its_runs_tables_and_figure(tiny_config: Make, tmp_path: Path) -> None:
    said: list[str] = []
    experiment = {"num_rounds": 1, **tiny_config().model_dump(mode="json", exclude_unset=True)} | {"num_rounds": 1}
    study: dict[str, Any] = {"experiment": experiment, "seeds": [0], "name": "two arms"}
    study["arms"] = {"consensus": {}, "alone": {"algorithm": {"name": "local_only"}}}
    done = sr.compare(study, out=tmp_path / "out", say=said.append)
    assert done.failed == 0
    assert len(said) == 2
    found = sr.load(tmp_path / "out")
    assert isinstance(found, sr.Comparison)
    assert repr(found) == f"<semcons_ray.Comparison '{tmp_path}/out': 2 of 2 runs>"
    assert list(found.table.index) == ["consensus", "alone"]
    assert found.runs["alone", 0].config.algorithm.name == "local_only"
    loss = mean_by_round(found.runs["alone", 0].metrics, "nll").iloc[-1]
    assert math.isclose(found.table.loc["alone", "nll"], loss)
    assert set(found.rounds["arm"]) == {"consensus", "alone"}
    assert found.figure.is_file()
    html = found._repr_html_()
    assert "two arms" in html
    assert html.count("data:image/svg+xml;base64,") == 1
    assert "alone" in str(found)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/comparison.yaml").write_text(dump_yaml(study))
    empty = sr.load(tmp_path / "empty")
    with pytest.raises(sr.RunFolderError, match="no run of the comparison is finished"):
        str(empty)


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_has_its_trials(tiny_config: Make, tmp_path: Path) -> None:
    experiment = {**tiny_config().model_dump(mode="json", exclude_unset=True), "num_rounds": 1}
    study = {"experiment": experiment, "space": {"prompts.budget": {"grid": [3, 6]}}, "name": "budgets"}
    done = sr.sweep(study, out=tmp_path / "out")
    assert done.failed == 0
    found = sr.load(tmp_path / "out")
    assert isinstance(found, sr.Sweep)
    assert sorted(found.table["prompts.budget"]) == [3, 6]
    assert {run.config.prompts.budget for run in found.runs.values()} == {3, 6}
    assert set(found.fronts) == {"total_bytes", "seconds", "joules"}
    assert set(found.effects["key"]) == {"prompts.budget"}
    assert found.figure.is_file()
    assert found._repr_html_().count("<svg") == 1
    assert repr(found) == f"<semcons_ray.Sweep '{tmp_path}/out': 2 trials finished>"
    assert str(found).startswith("budgets")
