import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semcons_ray.parts import find

Write = Callable[[str], str]
_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of its own, from which modules are found, and nothing known from other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    find.resolve.cache_clear()
    find.of_packages.cache_clear()


@pytest.fixture
def module(working_folder: Path) -> Write:
    """Writes a module into the working folder; its name, which no other has."""

    def write(text: str) -> str:
        name = f"own_module_{next(_NUMBERS)}"
        (working_folder / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    return write


@pytest.fixture
def package(working_folder: Path) -> Callable[[str, str], None]:
    """Installs a distribution that consists of entry points, in a folder on the path."""

    def install(name: str, entry_points: str) -> None:
        info = working_folder / "installed" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        if str(info.parent) not in sys.path:
            sys.path.append(str(info.parent))
        find.of_packages.cache_clear()
        find.resolve.cache_clear()

    return install
