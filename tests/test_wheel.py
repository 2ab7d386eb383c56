"""The wheel and the sdist hold all that the package needs, and work without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from semcons_ray import __version__
from semcons_ray.config import ExperimentConfig, changed_settings

pytestmark = [pytest.mark.packages, pytest.mark.slow, pytest.mark.real]

ROOT = Path(__file__).parents[1]


def call(*words: str | Path, folder: Path, **variables: str) -> str:
    """What a command prints in a folder, in which nothing of this checkout is found."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*map(str, words)], cwd=folder, env=environment | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, folder=tree)
    call(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out / "direct", tree, folder=tree)
    return out


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_holds_every_file_of_the_package_and_is_the_same_from_the_sdist(built: Path) -> None:
    (from_sdist,), (direct,) = built.glob("*.whl"), (built / "direct").glob("*.whl")
    assert len([*built.glob("semcons_ray-*.tar.gz")]) == 1
    held = contents(from_sdist)
    assert held == contents(direct)
    assert {name.partition("/")[0] for name in held} == {"semcons_ray", f"semcons_ray-{__version__}.dist-info"}
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "semcons_ray"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in names if (ROOT / name).is_file()} <= held.keys()


def test_an_installed_wheel_runs_from_an_empty_folder(
    built: Path, tmp_path: Path, tiny_config: Callable[..., ExperimentConfig]
) -> None:
    (wheel,) = built.glob("*.whl")
    site, folder = tmp_path / "site", tmp_path / "work"
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    call(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, folder=folder)
    here = {"PYTHONPATH": str(site)}
    semcons = site / "bin" / "semcons"
    assert call(semcons, "--version", folder=folder, **here) == f"semcons {__version__}\n"
    assert call(semcons, "init", "my", "--preset", "cpu", folder=folder, **here) == "my/config.yaml\n"
    assert (folder / "my/config.schema.json").is_file()
    settings = yaml.safe_dump(changed_settings(tiny_config(num_rounds=1)))
    (folder / "tiny.yaml").write_text(settings)
    told = call(semcons, "run", "tiny.yaml", "--out", "runs/tiny", folder=folder, **here)
    assert "report: runs/tiny/report.html" in told
    code = (
        "import semcons_ray as sr; run = sr.load('runs/tiny'); print(sr.__file__);"
        "print(run.finished, len(run.metrics), '<svg' in run._repr_html_())"
    )
    where, result = call(sys.executable, "-c", code, folder=folder, **here).splitlines()
    assert Path(where).is_relative_to(site)
    assert result == "True 6 True"
