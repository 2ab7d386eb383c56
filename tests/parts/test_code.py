"""The code of parts of one's own is kept with the run, and must stay the same while the run goes on."""

import importlib
import sys
from pathlib import Path

import pytest

from semcons_ray.errors import ConfigError, RunFolderError
from semcons_ray.parts import code, keep_code, resolve, use_code
from tests.parts.conftest import Write
from tests.parts.test_find import Install

RULE = "import {helper}\ndef rule(ballots): return {helper}.score(ballots)\n"


def kept(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_module_is_kept_with_what_it_has_loaded_from_beside_it(module: Write, tmp_path: Path) -> None:
    helper = module("def score(ballots): return ballots.similarity\n")
    module("raise RuntimeError  # which nothing has loaded\n")
    name = module(RULE.format(helper=helper))
    resolve("rule", f"{name}:rule")
    keep_code(tmp_path / "code", [("rule", f"{name}:rule"), ("metric", "chrF")])
    assert kept(tmp_path / "code") == {
        f"{file}.py": (tmp_path / f"{file}.py").read_text() for file in (name, helper)
    }


def test_a_package_is_kept_whole_but_for_what_is_hidden_or_compiled(tmp_path: Path) -> None:
    for file in ("inner/rules.py", "data.json", "__pycache__/x.pyc", ".git/config"):
        (tmp_path / "own_package" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own_package" / file).write_text("def rule(ballots): ...\n")
    resolve("rule", "own_package.inner.rules:rule")
    keep_code(tmp_path / "code", [("rule", "own_package.inner.rules:rule")])
    assert kept(tmp_path / "code").keys() == {"own_package/inner/rules.py", "own_package/data.json"}


def test_nothing_is_kept_of_what_is_built_in_or_installed(tmp_path: Path) -> None:
    keep_code(tmp_path / "code", [("rule", "medoid"), ("rule", "semcons_ray.consensus.rules:medoid")])
    resolve("metric", "difflib:SequenceMatcher.__init__")
    keep_code(tmp_path / "code", [("metric", "difflib:SequenceMatcher.__init__")])
    assert not (tmp_path / "code").exists()


def test_a_package_that_is_elsewhere_brings_its_names(module: Write, package: Install, tmp_path: Path) -> None:
    name = module("def rule(ballots): ...\n")
    points = f"[semcons_ray.rules]\nkept_rule = {name}:rule\n"
    package("keeper", points)
    resolve("rule", "kept_rule")
    keep_code(tmp_path / "code", [("rule", "kept_rule")])
    assert kept(tmp_path / "code")["keeper-1.0.dist-info/entry_points.txt"] == points
    assert f"{name}.py" in kept(tmp_path / "code")


def test_code_that_was_changed_since_is_refused_and_code_that_is_new_is_added(module: Write, tmp_path: Path) -> None:
    name, other = (module("def rule(ballots): ...\n") for _ in range(2))
    resolve("rule", f"{name}:rule")
    for _ in range(2):
        keep_code(tmp_path / "code", [("rule", f"{name}:rule")])
    resolve("rule", f"{other}:rule")
    keep_code(tmp_path / "code", [("rule", f"{other}:rule")])
    assert kept(tmp_path / "code").keys() == {f"{name}.py", f"{other}.py"}
    (tmp_path / f"{name}.py").write_text("def rule(ballots): return 3\n")
    with pytest.raises(RunFolderError, match=rf"^{name}\.py was changed since the run began, .* set it back, as it is"):
        keep_code(tmp_path / "code", [("rule", f"{name}:rule")])


def test_a_package_that_is_too_large_is_refused(
    module: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "MOST_BYTES", 10)
    name = module("def rule(ballots): ...\n")
    resolve("rule", f"{name}:rule")
    with pytest.raises(ConfigError, match=rf"{name}\.py holds .* install it as a package on all machines"):
        keep_code(tmp_path / "code", [("rule", f"{name}:rule")])
    assert not (tmp_path / "code").exists()


def test_kept_code_is_found_before_any_other_or_only_where_there_is_none(module: Write, tmp_path: Path) -> None:
    name = module("here = 'working folder'\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{name}.py").write_text("here = 'code'\n")
    sys.path.append(str(tmp_path))
    use_code(tmp_path / "nothing")
    use_code(tmp_path / "code", first=False)
    assert importlib.import_module(name).here == "working folder"
    sys.path.remove(str(tmp_path / "code"))
    del sys.modules[name]
    use_code(tmp_path / "code")
    assert importlib.import_module(name).here == "code"
