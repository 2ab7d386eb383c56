"""Replays of many runs: a comparison's arms and seeds, files, and what is refused."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.config import FederationConfig, dump_yaml
from semcons_ray.errors import ConfigError, RunFolderError, UserError
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.runs.experiment import run_experiment
from semcons_ray.studies.comparison import dump_comparison, load_comparison
from semcons_ray.studies.replays import write_virtual_time
from tests.invariants.runs import Silent
from tests.invariants.test_virtual_time import FEDERATION
from tests.studies.conftest import ARMS

BIG = {**FEDERATION["own_devices"]["fast"], "memory_gb": 400}
LARGE = {**FEDERATION, "own_devices": {"fast": BIG, "slow": BIG}}


@pytest.fixture(scope="module")
def done(compared: Path) -> sr.Replays:
    return sr.replay(compared, federation=FEDERATION)


def test_each_run_of_a_comparison_is_replayed_and_seeds_are_averaged(done: sr.Replays) -> None:
    assert {*done.runs} == {("consensus", 0), ("consensus", 1), ("averages", 0), ("averages", 1)}
    assert done.summary["runs"].tolist() == [2, 2]
    hours = done.totals.query("arm == 'averages'")["hours"].to_numpy()
    told = done.summary.loc["averages", ["hours", "hours_half_width"]].tolist()
    assert told == pytest.approx(mean_and_half_width(hours))
    assert done.summary.loc["averages", "algorithm"] == "fedavg_lora"
    assert len(done.rounds) == 4 * 2
    assert done.rounds.groupby(["arm", "seed"])["hours"].last().to_dict() == done.totals.set_index(["arm", "seed"])[
        "hours"
    ].to_dict()
    assert done.visits.groupby(["arm", "seed", "round"]).size().eq(4).all()


def test_hours_to_a_loss_of_each_run(done: sr.Replays) -> None:
    worst = float(done.totals["loss"].max())
    assert (done.hours_to(worst) <= done.totals.set_index(["arm", "seed"])["hours"]).all()
    assert done.hours_to(0.0).isna().all()


def test_the_text_has_a_row_for_each_arm_and_says_where_numbers_are_from(done: sr.Replays) -> None:
    text = str(done)
    assert "3 fast, 1 slow" in text
    for words in ("consensus", "averages", "calculated", "measured", "t-interval"):
        assert words in text
    assert "(scaled)" not in text


def test_scaled_columns_say_so(compared: Path) -> None:
    scaled = sr.replay(compared, federation=LARGE, model="llama-3.1-8b")
    assert scaled.sources["bytes"] == "measured or scaled"
    own = sr.replay(compared, federation=LARGE).summary["bytes"]
    assert scaled.summary["bytes"]["consensus"] == own["consensus"]
    assert scaled.summary["bytes"]["averages"] > 100 * own["averages"]
    assert "llama-3.1-8b" in str(scaled)


def test_what_is_written_says_in_each_column_where_it_is_from(done: sr.Replays, tmp_path: Path, compared: Path) -> None:
    done.write(tmp_path / "several")
    written = {path.name for path in (tmp_path / "several").iterdir()}
    assert written == {
        *("totals.csv", "rounds.csv", "visits.parquet", "quality.svg", "quality.png", "hours.svg", "hours.png")
    }
    totals = pd.read_csv(tmp_path / "several" / "totals.csv")
    assert {"arm", "seed", "hours [calculated]", "bytes [measured]", "loss [measured]"} <= {*totals}
    assert totals["hours [calculated]"].tolist() == pytest.approx(done.totals["hours"].tolist())
    visits = pd.read_parquet(tmp_path / "several" / "visits.parquet")
    assert "uplink_bytes [measured]" in visits
    one = next(path.parent for path in sorted(compared.glob("runs/*/*/config.yaml")))
    sr.replay(one, federation=FEDERATION).write(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        *("totals.csv", "rounds.csv", "visits.parquet", "timeline.svg", "timeline.png")
    }
    sr.replay(one, federation=FEDERATION).write(tmp_path / "again")
    for path in (tmp_path / "one").glob("timeline.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_federation_is_a_file_a_mapping_or_a_config(compared: Path, done: sr.Replays, tmp_path: Path) -> None:
    file = tmp_path / "F.yaml"
    file.write_text(dump_yaml({"num_rounds": 7, "federation": FEDERATION}))
    for given in (file, str(file), FederationConfig(**FEDERATION)):
        assert sr.replay(compared, federation=given).totals.equals(done.totals)


def test_runs_beside_comparisons_are_told_apart_by_their_folders(compared: Path) -> None:
    one = next(path.parent for path in sorted(compared.glob("runs/*/*/config.yaml")))
    arms = sr.replay(compared, one, federation=FEDERATION).summary.index.tolist()
    assert arms == [f"{compared}: consensus", f"{compared}: averages", str(one)]


def test_runs_that_are_not_finished_are_left_out_aloud(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = load_comparison(compared / "comparison.yaml").model_copy(update={"seeds": (0, 1, 2)})
    (tmp_path / "comparison.yaml").write_text(dump_comparison(more))
    with pytest.raises(RunFolderError, match="none of its runs is finished"):
        sr.replay(tmp_path, federation=FEDERATION)
    (tmp_path / "runs").symlink_to(compared / "runs")
    assert sr.replay(tmp_path, federation=FEDERATION).summary["runs"].tolist() == [2, 2]
    assert "2 of 6 runs are not finished" in caplog.text


def test_a_sweeps_trials_are_arms_of_their_own(compared: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("space: {}\n")
    (tmp_path / "trials").mkdir()
    for number, path in enumerate(sorted(compared.glob("runs/*/*/config.yaml"))):
        (tmp_path / "trials" / f"trial-{number}").symlink_to(path.parent)
    assert sr.replay(tmp_path, federation=FEDERATION).summary.index.tolist() == [f"trial-{place}" for place in range(4)]


def test_a_comparison_with_clocks_has_its_replays_beside_it(compared: Path, tiny_config: Any, tmp_path: Path) -> None:
    said: list[str] = []
    settings = tiny_config(resources={"fleet": "local"}, federation=FEDERATION)
    experiment = settings.model_dump(mode="json", exclude_unset=True)
    sr.compare({"seeds": [0, 1], "experiment": experiment, "arms": ARMS}, out=tmp_path / "of_clocks", say=said.append)
    found = tmp_path / "of_clocks" / "virtual_time"
    assert said[-1].endswith(str(found))
    totals = pd.read_csv(found / "totals.csv")
    assert totals["hours [calculated]"].tolist() == pytest.approx(sr.replay(found.parent).totals["hours"].tolist())
    assert (found / "quality.svg").is_file()
    assert write_virtual_time(compared) is None
    assert not (compared / "virtual_time").exists()
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "sweep.yaml").write_text("space: {}\n")
    (tmp_path / "some" / "trials").mkdir()
    for name, study in (("timed", found.parent), ("plain", compared)):
        run = next(path.parent for path in sorted(study.glob("runs/*/*/config.yaml")))
        (tmp_path / "some" / "trials" / name).symlink_to(run)
    assert write_virtual_time(tmp_path / "some") is None


def test_a_study_whose_trace_is_gone_is_not_lost_by_it(
    tiny_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client_id,start_hours,end_hours\n0,0,24\n1,0,24\n2,0,24\n")
    there = {"availability": "trace", "availability_options": {"path": str(trace)}}
    settings = tiny_config(num_rounds=1, resources={"fleet": "local"}, federation=FEDERATION | there)
    study = tmp_path / "sweep" / "trials"
    study.mkdir(parents=True)
    run_experiment(settings, study / "one", Silent())
    (study.parent / "sweep.yaml").write_text("space: {}\n")
    assert write_virtual_time(study.parent) == study.parent / "virtual_time"
    trace.unlink()
    assert write_virtual_time(study.parent) is None
    assert "trace.csv" in caplog.text


def test_a_sweep_of_which_no_trial_is_finished_has_no_replays(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("space: {}\n")
    assert write_virtual_time(tmp_path) is None


def test_what_is_refused(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the folder of a run"):
        sr.replay(federation=FEDERATION)
    with pytest.raises(ConfigError, match=r"has no federation\.devices of its own; give a file that has"):
        sr.replay(compared)
    with pytest.raises(ConfigError, match=r"unknown setting 'federation\.device'"):
        sr.replay(compared, federation={"device": {}})
    file = tmp_path / "F.yaml"
    file.write_text("num_rounds: 3\n")
    with pytest.raises(ConfigError, match=r"F\.yaml has no section federation"):
        sr.replay(compared, federation=file)
    with pytest.raises(ConfigError, match=r"federation\.policy_options"):
        sr.replay(compared, federation={**FEDERATION, "policy": "deadline", "policy_options": {"hours": -1}})
    with pytest.raises(RunFolderError):
        sr.replay(tmp_path / "nowhere", federation=FEDERATION)
