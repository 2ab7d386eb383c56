"""What `semcons_ray` offers: every name is there, documented and typed, and costs nothing until it is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import semcons_ray as sr
from semcons_ray.api import doctor, experiments, results
from semcons_ray.parts import PROTOCOLS

ROOT = Path(__file__).parents[2]


def test_every_public_name_of_the_room_is_offered_and_the_list_is_sorted() -> None:
    for module in (experiments, results):
        own = {
            name
            for name, value in vars(module).items()
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
            if not name.startswith("_")
        }
        assert own <= set(sr.__all__), module
    assert {name for name in vars(sr.errors) if name.endswith("Error")} - {"annotations"} <= set(sr.__all__)
    assert sr.__all__ == sorted(set(sr.__all__))
    assert dir(sr) == sr.__all__
    assert doctor.diagnose is sr.diagnose


def test_the_protocols_of_own_parts_are_offered() -> None:
    assert {path.partition(":")[2] for path in PROTOCOLS.values()} <= set(sr.__all__)


@pytest.mark.parametrize("name", [name for name in sr.__all__ if name != "__version__"])
def test_every_name_is_there_and_explains_itself(name: str) -> None:
    value = getattr(sr, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_a_name_that_is_not_there_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'semcons_ray' has no attribute 'runn'"):
        _ = sr.runn  # type: ignore[attr-defined]


def test_what_type_checkers_are_told_is_what_is_offered() -> None:
    told: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "semcons_ray/__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("semcons_ray"):
            told |= {alias.name for alias in node.names}
    assert told == set(sr.__all__) - {"__version__"}


def test_importing_the_package_imports_nothing_large() -> None:
    code = (
        "import sys; import semcons_ray as sr; sr.__version__, dir(sr);"
        "print(*({'torch', 'ray', 'pandas', 'numpy', 'transformers', 'pydantic', 'rich'} & sys.modules.keys()));"
        "sr.ConfigError, sr.run, sr.ExperimentConfig;"
        "print(*({'torch', 'ray', 'pandas', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n\n"


SCRIPT = '''\
import pandas as pd

import semcons_ray as sr


class Heard(sr.Observer):
    def round_ends(self, commit: sr.Commit) -> None:
        print(commit.summary.round)


run = sr.run({"num_rounds": 1}, out="runs/one", observers=[Heard()])
frame: pd.DataFrame = run.metrics
tables: dict[str, pd.DataFrame] = run.report()
found = sr.load("runs/one")
if isinstance(found, sr.Comparison):
    found.runs["an arm", 0].labels(1)
sr.compare([{"seeds": [0]}, "more.yaml"]).table
sr.plan(sr.ExperimentConfig(), "run").seconds + 1.0
'''


@pytest.mark.slow
def test_a_users_script_is_checked_by_its_types(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(SCRIPT)
    wrong.write_text("import semcons_ray as sr\nsr.run(3.5)\nsr.runn()\nsr.load('a').metrics\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(right), str(wrong)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert str(right) not in said
    assert 'Argument 1 to "run" has incompatible type "float"' in said
    assert 'Module has no attribute "runn"' in said
    assert 'Item "Sweep" of "Run | Comparison | Sweep" has no attribute "metrics"' in said
    assert "in 1 file (checked 2 source files)" in said
