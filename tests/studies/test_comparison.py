import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.errors import ConfigError
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.comparison import (
    DEFAULT_ARMS,
    ComparisonConfig,
    dump_comparison,
    load_comparison,
    plan_runs,
    run_comparison,
)

LOCAL_ONLY = {"algorithm": {"name": "local_only"}}


def write(folder: Path, values: Any) -> Path:
    path = folder / "comparison.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def test_of_several_files_each_is_laid_over_those_before_it(tmp_path: Path) -> None:
    base, study, more = (tmp_path / name for name in ("base.yaml", "study.yaml", "more.yaml"))
    base.write_text("name: base\nnum_rounds: 9\ntraining: {batch_size: 2, local_epochs: 5}\n")
    study.write_text("name: study\nexperiment: {training: {batch_size: 3}}\nseeds: [1, 2]\narms: {a: {}, b: {}}\n")
    more.write_text("arms: {c: {seeds: 1}}\n")
    read = load_comparison([base, study], {"model": {"max_length": 32}})
    assert (read.name, read.seeds, list(read.arms)) == ("study", (1, 2), ["a", "b"])
    assert read.experiment == {
        "name": "base", "num_rounds": 9, "training": {"batch_size": 3, "local_epochs": 5}, "model": {"max_length": 32}
    }  # fmt: skip
    assert list(load_comparison([study, more]).arms) == ["c"]
    for wrong, said in (
        ("experiment: {training: {batch_size: 0}}", f"{more}, experiment: training.batch_size: "),
        ("seeds: [x]", f"{more}: seeds.0: "),
        ("training: {batch_size: 0}", f"{more}, experiment: training.batch_size: "),
    ):
        more.write_text(wrong)
        with pytest.raises(ConfigError) as caught:
            load_comparison([base, study, more])
        assert str(caught.value).startswith(said)


def test_without_a_file_the_defaults_are_compared() -> None:
    comparison = load_comparison(None)
    assert comparison.seeds == (0, 1, 2)
    assert comparison.arms == DEFAULT_ARMS
    runs = plan_runs(comparison, Path("out"))
    assert len(runs) == 3 * len(DEFAULT_ARMS)
    assert (runs[0].arm, runs[0].seed, runs[0].folder) == (
        "semantic consensus",
        0,
        Path("out/runs/semantic-consensus/seed_0"),
    )
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_arms_may_share_models_that_only_some_of_them_have(tmp_path: Path) -> None:
    text = """
experiment: {clients: {models: {polly: {kind: "tests.parrots:Parrot"}}}}
arms: {flock: {model: {name: polly}}, open: {}}
"""
    flock, other = (run.config for run in plan_runs(load_comparison(write(tmp_path, text)), tmp_path)[::3])
    assert (flock.other_models, other.other_models, other.clients.models) == (("polly",), (), {})


def test_every_default_arm_is_valid_and_only_its_own_settings_differ() -> None:
    for run in plan_runs(load_comparison(None), Path("out")):
        own = {"seed": run.seed, "name": f"{run.arm}, seed {run.seed}"}
        assert run.config == validate_config({**DEFAULT_ARMS[run.arm], **own}, where="test")


def test_arms_lie_over_the_experiment_and_the_command_line_below_them(tmp_path: Path) -> None:
    values = {
        "experiment": {"training": {"batch_size": 2, "local_epochs": 2}},
        "arms": {"a": {}, "b": {"training": {"batch_size": 8}}},
    }
    comparison = load_comparison(write(tmp_path, values), {"training": {"batch_size": 3}, "num_rounds": 7})
    a, b = (run.config for run in plan_runs(comparison, tmp_path)[:2])
    assert (a.training.batch_size, a.training.local_epochs, a.num_rounds) == (3, 2, 7)
    assert (b.training.batch_size, b.training.local_epochs, b.num_rounds) == (8, 2, 7)


def test_a_config_of_run_is_the_experiment(tmp_path: Path) -> None:
    path = write(tmp_path, {"name": "mine", "seed": 1, "num_rounds": 9})
    comparison = load_comparison(path)
    assert comparison.name == "mine"
    assert comparison.arms == DEFAULT_ARMS
    assert {run.config.num_rounds for run in plan_runs(comparison, tmp_path)} == {9}
    assert [run.config.seed for run in plan_runs(comparison, tmp_path)][:: len(DEFAULT_ARMS)] == [0, 1, 2]
    assert load_comparison(write(tmp_path, "")) == load_comparison(None)


def test_a_section_of_which_only_the_name_is_left_is_empty(tmp_path: Path) -> None:
    comparison = load_comparison(write(tmp_path, "experiment:\narms:\n  one:\n"))
    assert plan_runs(comparison, tmp_path)[0].config.algorithm == ExperimentConfig().algorithm


def test_what_is_dumped_is_read_back_and_holds_every_setting(tmp_path: Path) -> None:
    first = load_comparison(
        write(tmp_path, {"seeds": [4], "experiment": {"num_rounds": 2}, "arms": {"é b": LOCAL_ONLY}})
    )
    again = load_comparison(write(tmp_path, dump_comparison(first)))
    assert dump_comparison(again) == dump_comparison(first)
    assert again.arms == first.arms
    assert set(again.experiment) == set(ExperimentConfig.model_fields) - {"seed", "name"}
    assert [run.config for run in plan_runs(again, tmp_path)] == [run.config for run in plan_runs(first, tmp_path)]


def test_numbers_and_paths_of_arms_are_read_as_those_of_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.csv").touch()
    monkeypatch.chdir(tmp_path)
    text = """
experiment: {data: {source: mine.csv}, training: {max_grad_norm: '1e-3'}}
arms:
  a: {training: {learning_rate: '1e-3'}, model: {name: ./a}}
  b: {training: {learning_rate: 1e-3}, clients: {mix: {./a: 1, org/b: '3'}}}
"""
    comparison = load_comparison(write(tmp_path, text), {"server": {"embedding_model": "./e"}})
    monkeypatch.chdir("/")
    assert comparison.arms == {
        "a": {"training": {"learning_rate": 0.001}, "model": {"name": f"{tmp_path}/a"}},
        "b": {"training": {"learning_rate": 0.001}, "clients": {"mix": {f"{tmp_path}/a": 1.0, "org/b": 3.0}}},
    }
    for read in (comparison, load_comparison(write(tmp_path, dump_comparison(comparison)))):
        a, b = (run.config for run in plan_runs(read, tmp_path)[:2])
        assert a.training.learning_rate == b.training.learning_rate == a.training.max_grad_norm == 0.001
        assert a.model.name == f"{tmp_path}/a"
        assert b.clients.mix == {f"{tmp_path}/a": 1.0, "org/b": 3.0}
        assert {a.data.source, b.data.source} == {f"{tmp_path}/mine.csv"}
        assert {a.server.embedding_model, b.server.embedding_model} == {f"{tmp_path}/e"}


BAD: dict[str, tuple[Any, str]] = {
    "a list": ("- 1", "holds a list"),
    "no YAML": ("arms: [1,", "not valid YAML"),
    "an unknown key": ({"arms": {"a": {}}, "seed": 1}, "unknown setting 'seed'"),
    "an unknown setting of all": ({"experiment": {"num_round": 1}}, "experiment: unknown setting 'num_round'"),
    "an unknown setting of an arm": ({"arms": {"a": {}, "b": {"sed": 1}}}, "arm 'b': unknown setting 'sed'"),
    "a bad value of an arm": ({"arms": {"b": {"algorithm": {"name": "fedmagic"}}}}, "arm 'b': algorithm.name"),
    "an arm that is a word": ({"arms": {"b": "local_only"}}, "arms.b"),
    "no arms": ({"arms": {}}, "arms"),
    "no seeds": ({"seeds": []}, "seeds"),
    "a seed twice": ({"seeds": [1, 2, 1]}, "seeds 1, 2, 1 name a seed twice"),
    "a negative seed": ({"seeds": [-1]}, "seeds.0"),
    "a seed of an arm's own": ({"arms": {"a": {"seed": 3}}}, "arms.a.seed"),
    "a seed that is not among the seeds": ({"seeds": [1], "experiment": {"seed": 3}}, "experiment.seed is 3"),
    "an unknown reference": ({"reference": "FedMagic"}, "reference 'FedMagic' is not among the arms"),
    "an unknown baseline": ({"baseline": "none"}, "baseline 'none' is not among the arms"),
    "two arms of one folder": ({"arms": {"a b": {}, "A-b": {}}}, "would share a folder"),
    "an arm without a letter": ({"arms": {"..": {}}}, "needs letters or digits"),
    "an experiment that is a word": ({"experiment": "default"}, "experiment"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_comparison(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, says = BAD[name]
    assert_refused(["compare", str(write(tmp_path, values)), "--out", str(tmp_path / "out")], says, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/no/such.yaml", "--out", "{}/out"], "cannot read /no/such.yaml"),
        (["--out", "{}"], "is not empty and holds no comparison"),
        (["--out", "{}/file"], "is not empty and holds no comparison"),
        (["--out", "{}/file/below"], "cannot read or write"),
        (["--num_round", "3", "--out", "{}/out"], "experiment: unknown setting 'num_round'"),
        (["--seed", "--out", "{}/out"], "--seed needs a value"),
        (["--seed", "5", "--out", "{}/out"], "experiment.seed is 5"),
        ([], "required: --out"),
    ],
)
def test_bad_command_line(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(["compare", *(word.format(tmp_path) for word in arguments)], says, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def assert_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's way
        code = int(exit.code or 0)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("semcons: ")
    assert error.count("\n") == 1
    assert says in error


def test_a_run_with_other_settings_is_named_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = load_comparison(None)
    run = plan_runs(comparison, tmp_path)[1]
    (tmp_path / "comparison.yaml").write_text(dump_comparison(comparison))
    RunFolder.create(run.folder, run.config)
    kept = (run.folder / "config.yaml").read_bytes()
    assert_refused(
        ["compare", "--training.learning_rate", "0.1", "--out", str(tmp_path)],
        f"{run.folder}: training.learning_rate was changed from 0.0005 to 0.1 since it began; set that back, or begin",
        capsys,
    )
    assert (run.folder / "config.yaml").read_bytes() == kept


@pytest.fixture(scope="module")
def values(tiny_config: Callable[..., ExperimentConfig]) -> dict[str, Any]:
    """A comparison of two arms and one seed on tiny models."""
    experiment = tiny_config(clients={"num_clients": 2}).model_dump(mode="json", exclude={"name", "seed"})
    return {"seeds": [0], "experiment": experiment, "arms": {"semantic consensus": {}, "local only": LOCAL_ONLY}}


@pytest.fixture(scope="module")
def compared(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    assert main(["compare", str(write(folder, values)), "--name", "tiny", "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.mark.slow
@pytest.mark.real
def test_two_arms_are_run_on_the_same_data_and_compared(compared: Path) -> None:
    runs = [compared / "runs" / name / "seed_0" for name in ("semantic-consensus", "local-only")]
    assert all(RunFolder(run).commits() for run in runs)
    assert runs[0].joinpath("data.parquet").read_bytes() == runs[1].joinpath("data.parquet").read_bytes()
    metrics = [pd.read_parquet(run / "metrics.parquet") for run in runs]
    base = [table.loc[table["round"] == 0, "nll"].tolist() for table in metrics]
    assert base[0] == base[1]
    assert {path.name for path in compared.iterdir()} == {
        *("comparison.yaml", "environment.json", "runs", "rounds.csv", "summary.csv", "stages.csv", "table.md"),
        *("pareto.svg", "pareto.png", "metrics.csv"),
    }
    summary = pd.read_csv(compared / "summary.csv", index_col="arm")
    for arm, table in zip(("semantic consensus", "local only"), metrics, strict=True):
        assert summary.loc[arm, "nll"] == pytest.approx(table.loc[table["round"] == 2, "nll"].mean())
    ledger = pd.read_parquet(runs[0] / "ledger.parquet")
    assert summary.loc["semantic consensus", "bytes"] == ledger[["uplink_bytes", "downlink_bytes"]].to_numpy().sum()
    assert summary.loc["local only", "bytes"] == 0
    by_metric = pd.read_csv(compared / "metrics.csv").set_index(["arm", "metric"])
    both = by_metric["value"].unstack("arm")
    for name in ("nll", "rouge_l"):
        assert both.loc[name].to_dict() == pytest.approx(summary[name].to_dict())
        difference = by_metric.loc[("local only", name), "difference"]
        assert difference == pytest.approx(both.loc[name, "local only"] - both.loc[name, "semantic consensus"])
    assert (compared / "table.md").read_text(encoding="utf-8").startswith("# tiny\n")
    rounds = pd.read_csv(compared / "rounds.csv")
    assert rounds.groupby("arm", sort=False)["round"].apply(list).to_dict() == {
        "semantic consensus": [0, 1, 2],
        "local only": [0, 1, 2],
    }


@pytest.mark.slow
@pytest.mark.real
def test_finished_runs_are_kept_others_resumed_and_arms_and_seeds_added(
    compared: Path, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    finished, unfinished = out / "runs/semantic-consensus/seed_0", out / "runs/local-only/seed_0"
    shutil.rmtree(unfinished / "adapters")
    (unfinished / "state" / "round_002.msgpack").unlink()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.rglob("*") if path.is_file()}
    first_round = (unfinished / "state" / "round_001.msgpack").read_bytes()

    broken = {"model": {"lora": {"target_modules": ["nowhere"]}}}
    more = {**values, "seeds": [0, 1], "arms": {**values["arms"], "broken": broken}}
    del more["arms"]["semantic consensus"]
    more["arms"] = {"semantic consensus": {}, **more["arms"]}
    assert main(["compare", str(write(tmp_path, more)), "--out", str(out)]) == 1

    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith(("[", "1 of"))]
    assert lines[0] == "1 of 6 runs are finished"
    assert [line[:6] for line in lines[1:]] == [f"[{number}/6] " for number in (2, 3, 4, 5, 6)]
    failed = [line for line in lines if "failed: " in line]
    assert [line[6:20] for line in failed] == ["broken, seed 0", "broken, seed 1"]
    assert all("model.lora.target_modules" in line for line in failed)
    assert "broken" not in captured.out
    assert "semantic consensus" in captured.out

    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert (unfinished / "state" / "round_001.msgpack").read_bytes() == first_round
    resumed, straight = (pd.read_parquet(at / "runs/local-only/seed_0/metrics.parquet") for at in (out, compared))
    pd.testing.assert_frame_equal(resumed, straight, check_exact=True)
    summary = pd.read_csv(out / "summary.csv", index_col="arm")
    assert summary["seeds"].to_dict() == {"semantic consensus": 2, "local only": 2}

    # Taking out what was added gives the first tables again, without a run.
    told: list[str] = []
    result, failures = run_comparison(ComparisonConfig.model_validate(values), out, told.append)
    assert (told, failures) == (["2 of 2 runs are finished"], 0)
    assert result is not None
    assert result.summary["nll"].tolist() == pytest.approx(pd.read_csv(compared / "summary.csv")["nll"].tolist())


@pytest.mark.slow
@pytest.mark.real
def test_settings_that_say_only_where_it_runs_may_change(compared: Path, values: dict[str, Any]) -> None:
    told: list[str] = []
    changed = {**values["experiment"], "resources": {"fleet": "local", "threads_per_worker": 2, "device": "auto"}}
    changed["model"] = {**changed["model"], "dtype": "auto"}
    run_comparison(ComparisonConfig.model_validate({**values, "experiment": changed}), compared, told.append)
    assert told == ["2 of 2 runs are finished"]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.ray
def test_on_ray_runs_follow_one_another(values: dict[str, Any], tmp_path: Path) -> None:
    resources = {"fleet": "ray", "device": "cpu", "max_workers": 1}
    experiment = {**values["experiment"], "num_rounds": 1, "resources": resources}
    comparison = ComparisonConfig.model_validate(
        {"seeds": [0], "experiment": experiment, "arms": {"alone": LOCAL_ONLY}}
    )
    told: list[str] = []
    result, failures = run_comparison(comparison, tmp_path, told.append)
    assert failures == 0
    assert [line[:30] for line in told] == ["[1/1] alone, seed 0: test NLL "]
    assert result is not None
    assert result.summary.index.tolist() == ["alone"]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("whom", ["group", "parent"])
def test_an_interrupt_ends_all_processes(whom: str, values: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {**values, "experiment": {**values["experiment"], "num_rounds": 50}})
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "compare", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a shell's background jobs, such as a CI's, may have been told to ignore it
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/runs/*/seed_0/state/round_001.msgpack")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if whom == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines() == ["interrupted; the same command goes on with what is not finished"]
    assert_group_is_gone(process.pid)


@pytest.mark.slow
@pytest.mark.real
def test_processes_end_when_their_parent_is_killed(values: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {**values, "experiment": {**values["experiment"], "num_rounds": 50}})
    command = [sys.executable, "-m", "semcons_ray.commands.cli", "compare", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/runs/*/seed_0/state")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert_group_is_gone(process.pid)


def assert_group_is_gone(group: int) -> None:
    """No process of the group is left, but for the dead that nobody has asked after yet."""

    def alive() -> list[int]:
        found = []
        for process in psutil.process_iter(["pid", "status"]):
            try:
                if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except ProcessLookupError:
                continue
        return found

    deadline = time.monotonic() + 15
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()
