"""A run at a URL: copied round by round, resumed from the copy alone, whatever was lost with the machine."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

import semcons_ray as sr
from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config, dump_yaml
from semcons_ray.errors import RunFolderError
from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.remote_folder import Copying, RemoteFolder, locate_study
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.batch import Job, perform
from semcons_ray.studies.comparison import RUNS, SETTINGS
from tests.invariants.runs import Silent, StoppedError, assert_same_run

MakeConfig = Callable[..., ExperimentConfig]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("semcons_ray.runs.remote_folder.cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield {"file": f"file://{tmp_path}/store/first", "memory": "memory://bucket/first"}[request.param]
    fsspec.filesystem("memory").store.clear()


def names(url: str) -> set[str]:
    fs, root = fsspec.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/") for path in fs.find(root)}


def test_what_changed_is_copied_and_what_is_gone_goes(url: str) -> None:
    remote = RemoteFolder(url)
    (remote.folder / "state").mkdir(parents=True)
    for name in ("config.yaml", "state/lock", "state/round_000", "state/.half"):
        (remote.folder / name).write_text("one")
    remote.copy()
    assert names(url) == {"config.yaml", "state/round_000"}
    (remote.folder / "config.yaml").write_text("two")
    (remote.folder / "state/round_000").unlink()
    remote.copy()
    assert names(url) == {"config.yaml"}
    other = RemoteFolder(url)
    other.fetch()
    assert (other.folder / "config.yaml").read_text() == "two"


def test_a_table_of_an_earlier_version_makes_room_for_its_parts(url: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe(f"{root}/rounds.parquet", b"all")
    remote = RemoteFolder(url)
    remote.fetch()
    (remote.folder / "rounds.parquet").unlink()
    (remote.folder / "rounds.parquet").mkdir()
    (remote.folder / "rounds.parquet" / "round_000000.parquet").write_bytes(b"one")
    remote.copy()
    assert names(url) == {"rounds.parquet/round_000000.parquet"}


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "../../evil",
        "state/../../evil",
        "..",
        "state/..",
        "./evil",
        "state//evil",
        "/etc/evil",
        "..\\evil",
        "C:\\evil",
        "C:/evil",
        "state/c:evil",
        "config.yaml\nevil",
        "\x1b[2Jevil",
        "evil\x00",
    ],
)
def test_keys_that_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    try:
        for key in ("config.yaml", name):  # as they are: pipe() would tidy them up
            fs.store[f"/bucket/first/{key}"] = MemoryFile(fs, f"/bucket/first/{key}", b"content")
        remote = RemoteFolder("memory://bucket/first")
        with pytest.raises(
            RunFolderError, match=r"memory://bucket/first holds '.*', which no run folder does"
        ) as refused:
            remote.fetch()
    finally:
        fs.store.clear()
    assert len(str(refused.value).splitlines()) == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert not remote.folder.exists()


def test_names_in_any_script_and_with_dots_are_no_such_keys(url: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    kept = ["config.yaml", "..notes/a..b", "état/ноутс: 1.txt", "state/.x", "a b/...", "adapters/client_000/x.json"]
    for name in kept:
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe(f"{root}/{name}", b"content")
    remote = RemoteFolder(url)
    remote.fetch()
    assert all((remote.folder / name).read_text() == "content" for name in kept)


@pytest.mark.parametrize("inside", ["secret.txt", "state"])
def test_links_to_elsewhere_are_refused(inside: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "state").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret.txt").write_text("secret")
    store = tmp_path / "store"
    store.mkdir()
    (store / "config.yaml").write_text("one")
    (store / "same.yaml").symlink_to("config.yaml")
    RemoteFolder(f"file://{store}").fetch()
    (store / inside).symlink_to(tmp_path / "elsewhere" / inside)
    with pytest.raises(RunFolderError, match=f"holds '{store}/{inside}'"):
        RemoteFolder(f"file://{store}").fetch()


def test_a_commit_is_copied_after_all_that_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFolder(f"file://{tmp_path}/store")
    (remote.folder / "state").mkdir(parents=True)
    for name in ("state/round_001.msgpack", "state/server_001", "zuletzt.parquet"):
        (remote.folder / name).write_text(name)
    (remote.folder / "zuletzt.parquet").chmod(0)
    if os.access(remote.folder / "zuletzt.parquet", os.R_OK):  # root reads all the same
        (remote.folder / "zuletzt.parquet").unlink()
        (remote.folder / "zuletzt.parquet").symlink_to("/proc/self/mem")
    with pytest.raises(RunFolderError, match=r"cannot write file://"):
        remote.copy()
    assert "state/round_001.msgpack" not in names(remote.url)


def lose(reply: Reply) -> None:
    """Stop as if the machine were lost, in round 2."""
    if reply.round == 2:
        raise StoppedError


@pytest.mark.slow
@pytest.mark.real
def test_a_run_whose_machine_is_lost_is_resumed_from_its_url_to_the_same_numbers(
    tiny_config: MakeConfig, url: str, cache: Path, tmp_path: Path
) -> None:
    run_experiment(tiny_config(), tmp_path / "undisturbed", Silent())

    remote = RemoteFolder(url)
    remote.check_free()
    with pytest.raises(StoppedError):
        run_experiment(tiny_config(), remote.folder, Copying(remote), Silent(lose))
    shutil.rmtree(cache)
    again = RemoteFolder(url)
    again.fetch()
    resume_experiment(again.folder, Copying(again))
    again.copy()
    assert_same_run(tmp_path / "undisturbed", again.folder)
    assert {"adapters/client_000/adapter_model.safetensors", "metrics.parquet/round_000002.parquet"} <= names(url)


@pytest.mark.slow
@pytest.mark.real
def test_the_commands_take_urls(tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, url = tmp_path / "config.yaml", f"file://{tmp_path}/store/first"
    config.write_text(dump_config(tiny_config(num_rounds=1)))
    assert main(["run", str(config), "--out", url]) == 0
    assert (tmp_path / "store" / "first" / "report.html").is_file()
    (tmp_path / "store" / "first" / "report.html").unlink()
    assert main(["report", url]) == 0
    assert (tmp_path / "store" / "first" / "report.html").is_file()
    assert main(["resume", url]) == 0
    capsys.readouterr()
    assert main(["run", str(config), "--out", url]) == 2
    assert f"semcons resume {url}" in capsys.readouterr().err


def test_a_study_is_not_kept_where_something_else_is(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe(f"{root}/config.yaml", b"num_rounds: 2")
    assert main(["compare", "--out", url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{url} is not empty; choose another --out" in line
    assert names(url) == {"config.yaml"}


def test_a_study_goes_on_without_runs_that_were_copied_before_they_had_a_commit(url: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    for name in ("comparison.yaml", "runs/a/seed_0/config.yaml", "runs/b/seed_0/state/round_000.msgpack"):
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe(f"{root}/{name}", b"content")
    folder, remote = locate_study(url, SETTINGS, RUNS)
    assert remote
    assert {path.relative_to(folder).as_posix() for path in folder.glob(RUNS)} == {"runs/b/seed_0"}
    # Of the runs' folders the study itself copies and deletes nothing.
    (folder / "table.md").write_text("of all")
    (folder / "runs/b/seed_0/run.log").write_text("of one")
    (folder / "comparison.yaml").unlink()
    remote.copy()
    kept = {"runs/a/seed_0/config.yaml", "runs/b/seed_0/state/round_000.msgpack"}
    assert names(url) == {"table.md", *kept}
    of_run = remote.of_run(folder / "runs/b/seed_0")
    (folder / "runs/b/seed_0/run.log").write_text("of one, which goes on")
    (folder / "runs/b/seed_0/state/round_000.msgpack").unlink()
    of_run.copy()
    assert names(url) == {"table.md", "runs/a/seed_0/config.yaml", "runs/b/seed_0/run.log"}


@pytest.mark.slow
@pytest.mark.real
def test_a_run_of_a_study_whose_machine_is_lost_goes_on_from_the_url_to_the_same_numbers(
    tiny_config: MakeConfig, url: str, cache: Path, tmp_path: Path
) -> None:
    run_experiment(tiny_config(), tmp_path / "undisturbed", Silent())

    folder, remote = locate_study(url, SETTINGS, RUNS)
    assert remote
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text("{}")
    remote.copy()
    with pytest.raises(StoppedError):
        perform(Job(tiny_config(), folder / "runs/a/seed_0"), Silent(lose), remote=remote)
    shutil.rmtree(cache)
    folder, again = locate_study(url, SETTINGS, RUNS)
    job = Job(tiny_config(), folder / "runs/a/seed_0")
    assert len(RunFolder(job.folder).commits()) == 2
    perform(job, remote=again)
    assert_same_run(tmp_path / "undisturbed", job.folder)
    there = {str(path.relative_to(job.folder)) for path in job.folder.rglob("*") if path.is_file()}
    hidden = {name for name in there if any(part.startswith(".") for part in Path(name).parts)}
    assert names(f"{url}/runs/a/seed_0") == there - hidden - {"state/lock"}


@pytest.mark.slow
@pytest.mark.real
def test_a_comparison_at_a_url_is_read_and_repeated_from_there(
    tiny_config: MakeConfig, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, file = f"file://{tmp_path}/store/quality", tmp_path / "quality.yaml"
    experiment = tiny_config(num_rounds=1, clients={"num_clients": 2})
    values = {
        "seeds": [0],
        "arms": {"local only": {"algorithm": {"name": "local_only"}}},
        "experiment": experiment.model_dump(mode="json", exclude={"name", "seed"}),
    }
    file.write_text(dump_yaml(values))
    assert main(["compare", str(file), "--out", url]) == 0
    assert f"table and figure: {url}/table.md, {url}/pareto.svg" in capsys.readouterr().out
    stored = tmp_path / "store" / "quality"
    assert {"comparison.yaml", "table.md", "pareto.svg", "summary.csv", "runs"} <= {p.name for p in stored.iterdir()}
    shutil.rmtree(cache)
    before = {path: path.stat().st_mtime_ns for path in stored.glob("runs/**/*")}
    assert main(["compare", str(file), "--out", url]) == 0
    assert capsys.readouterr().err == "1 of 1 runs are finished\n"
    assert {path: path.stat().st_mtime_ns for path in stored.glob("runs/**/*")} == before
    shutil.rmtree(cache)
    found = sr.load(url)
    assert isinstance(found, sr.Comparison)
    assert found.table.index.tolist() == ["local only"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--out", "nowhere://bucket/run"], "cannot use nowhere://bucket/run"),
        (["run", "--out", "s3://bucket/run"], "s3"),
        (["resume", "memory://bucket/nothing"], "memory://bucket/nothing holds nothing"),
        (["report", "file:///no/such/run"], "file:///no/such/run holds nothing"),
        (["compare", "--out", "nowhere://bucket/runs"], "cannot use nowhere://bucket/runs"),
        (["compare", "--dry-run", "--out", "nowhere://bucket/runs"], "cannot use nowhere://bucket/runs"),
        (["sweep", "sweep.yaml", "--out", "nowhere://bucket/swept"], "cannot use nowhere://bucket/swept"),
        (["init", "s3://bucket/config"], "s3://bucket/config is a URL"),
    ],
)
def test_bad_urls_are_one_clear_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text("space: {prompts.budget: {grid: [4, 6]}}")
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert lines[0].startswith("semcons: ")
