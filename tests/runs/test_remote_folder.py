"""A run at a URL: copied round by round, resumed from the copy alone, whatever was lost with the machine."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.errors import RunFolderError
from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.remote_folder import Copying, RemoteFolder
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


@pytest.mark.slow
@pytest.mark.real
def test_a_run_whose_machine_is_lost_is_resumed_from_its_url_to_the_same_numbers(
    tiny_config: MakeConfig, url: str, cache: Path, tmp_path: Path
) -> None:
    run_experiment(tiny_config(), tmp_path / "undisturbed", Silent())

    def lose(reply: Reply) -> None:
        if reply.round == 2:
            raise StoppedError

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
    assert {"adapters/client_000/adapter_model.safetensors", "metrics.parquet"} <= names(url)


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--out", "nowhere://bucket/run"], "cannot use nowhere://bucket/run"),
        (["run", "--out", "s3://bucket/run"], "s3"),
        (["resume", "memory://bucket/nothing"], "memory://bucket/nothing holds nothing"),
        (["report", "file:///no/such/run"], "file:///no/such/run holds nothing"),
        (["compare", "--out", "s3://bucket/runs"], "s3://bucket/runs is a URL"),
        (["sweep", "sweep.yaml", "--out", "s3://bucket/swept"], "s3://bucket/swept is a URL"),
        (["init", "s3://bucket/config"], "s3://bucket/config is a URL"),
    ],
)
def test_bad_urls_are_one_clear_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert lines[0].startswith("semcons: ")
