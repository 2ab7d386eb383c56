"""The code of parts of one's own, kept in the run's folder, and sent to processes that do not see that.

A worker on another machine does not find a module of the working folder. And a module that is edited while a run goes
on would change it, if a worker is replaced or the run resumed. So a run keeps the modules that are not installed, with
what they have loaded from beside them, and its workers take them from there.
"""

from __future__ import annotations

import atexit
import importlib
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from semcons_ray.errors import ConfigError, RunFolderError, writing
from semcons_ray.parts.find import of_packages, path_of
from semcons_ray.parts.table import BUILT_IN, Kind

INSTALLED = ("site-packages", "dist-packages")
"""Folders in which packages are installed; whoever joins a run has them, as it has this package."""

MOST_BYTES = 32 << 20


def keep_code(folder: Path, named: Iterable[tuple[Kind, str]]) -> None:
    """Keep the code of parts that are not installed in a folder; what is there already must still be the same.

    Args:
        folder: The folder; it is made only if there is such code.
        named: Kinds and names of parts.

    Raises:
        ConfigError: A package is too large to be kept.
        RunFolderError: The code was changed since it was kept.
        StorageError: It cannot be written.
    """
    for name, content in _files([(kind, name) for kind, name in named if name not in BUILT_IN[kind]]).items():
        kept = folder / name
        if not kept.is_file():
            with writing(folder.parent):
                kept.parent.mkdir(parents=True, exist_ok=True)
                beside = kept.with_name(f".{kept.name}")
                beside.write_bytes(content)
                beside.rename(kept)
        elif kept.read_bytes() != content:
            raise RunFolderError(
                f"{name} was changed since the run began, whose numbers depend on it: set it back, as it is in "
                f"{folder}, or begin another run in a new folder"
            )


def use_code(folder: Path, *, first: bool = True) -> None:
    """Find modules in a folder that `keep_code` wrote: before all others, or only if they are nowhere else."""
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0 if first else len(sys.path), str(folder))
        importlib.invalidate_caches()


def read_code(folder: Path) -> dict[str, bytes]:
    """The files of a folder that `keep_code` wrote, by their paths in it; none if it is not there."""
    if not folder.is_dir():
        return {}
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in _inside(folder)}


def unpack_code(files: Mapping[str, bytes]) -> Path:
    """Write files that `read_code` gave to a folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="semcons-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _files(named: Sequence[tuple[Kind, str]]) -> dict[str, bytes]:
    """Files of modules that are not installed, by their paths below a folder in which Python finds them."""
    found: dict[str, bytes] = {}
    folders = set()
    for kind, name in named:
        top = path_of(kind, name).partition(":")[0].partition(".")[0]
        places = _places(sys.modules.get(top))
        folders |= {place.parent for place in places}
        points = of_packages(kind).get(name, [])
        for distribution in [point.dist for point in points if point.dist and places]:
            for file in ("METADATA", "entry_points.txt"):  # without them, the name would be known to nobody else
                info = f"{distribution.name}-{distribution.version}.dist-info/{file}"
                found[info] = (distribution.read_text(file) or "").encode()
    for name, module in [*sys.modules.items()]:
        places = [] if "." in name else [place for place in _places(module) if place.parent in folders]
        for place in places:
            found |= _read(place)
    return found


def _places(module: Any) -> list[Path]:
    """The file of a module, or the folders of a package, that is loaded; none if it is installed."""
    if module is None or module.__name__.partition(".")[0] in (__name__.partition(".")[0], "__main__"):
        return []
    inside = getattr(module, "__path__", None) or [getattr(module, "__file__", None)]
    places = [Path(place).resolve() for place in inside if place]
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return [one for one in places if not set(INSTALLED) & {*one.parts} and library not in one.parents and one.exists()]


def _read(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else [*_inside(place)]
    if (size := sum(file.stat().st_size for file in files)) > MOST_BYTES:
        raise ConfigError(
            f"{place} holds {size >> 20} MiB, more than the {MOST_BYTES >> 20} that a run keeps of one's own modules: "
            "install it as a package on all machines, or put its data elsewhere"
        )
    return {file.relative_to(place.parent).as_posix(): file.read_bytes() for file in files}


def _inside(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _inside(path)
        elif path.is_file():
            yield path
