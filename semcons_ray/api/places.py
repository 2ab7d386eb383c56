"""Where runs and studies are kept."""

from __future__ import annotations

import re
import time
from pathlib import Path

from semcons_ray.errors import RunFolderError


def local_folder(place: str | Path) -> Path:
    """A folder on this machine.

    Raises:
        RunFolderError: It is a URL.
    """
    if "://" in str(place):
        raise RunFolderError(f"{place} is a URL; only runs, comparisons and sweeps are kept at one")
    return Path(place)


def new_folder(name: str) -> Path:
    """A folder in runs/ that is not there yet, named after an experiment and the time."""
    words = re.sub(r"[^\w.]+", "-", name).strip("-.")[:40]
    stem = f"{words}-{time.strftime('%Y%m%d-%H%M%S')}"
    number, folder = 1, Path("runs") / stem
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-{number}"
    return folder
