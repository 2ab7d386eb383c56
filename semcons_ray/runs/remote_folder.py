"""A run's or study's folder at a URL (s3://, gs://, file:// or any other that fsspec knows), updated after each round.

Workers keep their clients' states in files that they rename, which an object store cannot do. So a run works in a local
folder, and the files that changed are copied to the URL when a round is committed. The copy at the URL is
authoritative: resume and report begin by fetching it. Files are copied in an order such that a run can be resumed from
the URL wherever copying stops: a round's commit after all files that belong to it, and deletions last.

Of a study, each run's folder is copied by the process that runs it, and what else there is by the study's own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from semcons_ray.errors import RunFolderError
from semcons_ray.modeling.packaged import cache_dir
from semcons_ray.runs.observers import Observer
from semcons_ray.runs.run_folder import Commit, RunFolder

logger = logging.getLogger(__name__)

_UNSAFE = re.compile(r"(^|/)(\.{0,2}(/|$)|[A-Za-z]:)|[\\\x00-\x1f\x7f]")
"""What a key may not have: an empty part, a part that is . or .., a drive, a backslash, or a control character."""


class RemoteFolder:
    """The run folder at a URL, and the local folder in which the run works.

    Args:
        url: A URL that fsspec can write to.
        folder: The local folder, of which all that there is so far is at the URL; None: a folder below the cache.

    Attributes:
        folder: The local folder. On a cluster, SEMCONS_CACHE must name a folder that all machines share.

    Raises:
        RunFolderError: The URL's protocol is unknown, needs a package that is not installed, or cannot be reached.
    """

    _left_out = ""
    """A folder in it that is not copied with the rest."""

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url)
        except Exception as error:  # whatever a protocol's package raises
            raise self._failed("use", error) from error
        name = self._root.rstrip("/").rpartition("/")[2] or "run"
        self.folder = folder or cache_dir() / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:16] / name
        self._copied = self._files() if folder else {}

    def check_free(self) -> None:
        """Prepare a new run: check that the URL is free, and empty the local folder.

        Raises:
            RunFolderError: There is something at the URL already, or it cannot be read.
        """
        try:
            taken = bool(self._fs.find(self._root))
        except Exception as error:
            raise self._failed("read", error) from error
        if taken:
            raise RunFolderError(f"{self.url} is not empty; choose another --out, or semcons resume {self.url}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def fetch(self) -> None:
        """Replace the local folder by a copy of what is at the URL.

        Raises:
            RunFolderError: There is nothing at the URL, it cannot be read, or it has a key that would lead out of the
                folder.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            paths = [path for path in self._fs.find(self._root) if not path.endswith("/")]
        except Exception as error:
            raise self._failed("read", error) from error
        names = {path: self._name(path) for path in paths}
        try:
            for path, name in names.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._fs.open(path, "rb") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        except Exception as error:
            raise self._failed("read", error) from error
        if not names:
            raise RunFolderError(f"{self.url} holds nothing; semcons run --out URL makes a run folder")
        self._copied = self._files()

    def copy(self) -> None:
        """Copy to the URL what changed in the local folder, and delete there what is gone.

        Raises:
            RunFolderError: It cannot be written.
        """
        files = self._files()
        changed = [name for name, stamp in files.items() if self._copied.get(name) != stamp]
        gone = self._copied.keys() - files.keys()
        in_the_way = {name for name in gone if (self.folder / name).is_dir()}  # tables of an earlier version
        try:
            for name in in_the_way:
                self._fs.rm_file(f"{self._root}/{name}")
            for name in sorted(changed, key=lambda name: name.startswith("state/round_")):
                path = f"{self._root}/{name}"
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                # In a transaction, for stores that have them: a reader then never sees half of a file.
                with self._fs.transaction, self._fs.open(path, "wb") as target, (self.folder / name).open("rb") as file:
                    shutil.copyfileobj(file, target)
            for name in gone - in_the_way:
                self._fs.rm_file(f"{self._root}/{name}")
        except Exception as error:
            raise self._failed("write", error) from error
        self._copied = files

    def _name(self, path: str) -> str:
        """The path within the folder of a key at the URL, which may have been chosen by anybody.

        Raises:
            RunFolderError: It would lead out of the local folder, on any system, or out of the folder at the URL.
        """
        root = self._root.rstrip("/") + "/"
        name = path.removeprefix(root)
        leads_out = not path.startswith(root) or _UNSAFE.search(name) is not None
        if isinstance(self._fs, LocalFileSystem):  # a symbolic link shows what lies elsewhere
            leads_out |= not Path(path).resolve().is_relative_to(Path(root).resolve())
        if leads_out:
            raise RunFolderError(f"{self.url} holds {path!r}, which no run folder does; remove it there")
        return name

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and modification time of each file, without files that are being written and the lock."""
        found = {}
        for folder, below, files in os.walk(self.folder):
            within = Path(folder).relative_to(self.folder)
            below[:] = [name for name in below if not name.startswith(".") and str(within / name) != self._left_out]
            for name in files:
                if not name.startswith(".") and (key := (within / name).as_posix()) != "state/lock":
                    stat = (Path(folder) / name).stat()
                    found[key] = stat.st_size, stat.st_mtime_ns
        return found

    def _failed(self, verb: str, error: Exception) -> RunFolderError:
        return RunFolderError(f"cannot {verb} {self.url}: {str(error) or type(error).__name__}")


class RemoteStudy(RemoteFolder):
    """The folder of a comparison or a sweep at a URL.

    Args:
        url: A URL that fsspec can write to.
        settings: The file with the study's settings.
        runs: A pattern of its run folders.

    Raises:
        RunFolderError: See `RemoteFolder`.
    """

    def __init__(self, url: str, settings: str, runs: str) -> None:
        self._settings, self._runs = settings, runs
        self._left_out = runs.partition("/")[0]
        super().__init__(url)

    def go_on(self) -> None:
        """Fetch what there is of the study, or check that the URL is free.

        Raises:
            RunFolderError: There is something else at the URL, or it cannot be read.
        """
        try:
            has_begun = self._fs.exists(f"{self._root}/{self._settings}")
        except Exception as error:
            raise self._failed("read", error) from error
        if not has_begun:
            self.check_free()
            return
        self.fetch()
        for run in self.folder.glob(self._runs):
            if not (run / "state" / "round_000.msgpack").is_file():  # copying stopped before there was a commit
                shutil.rmtree(run)

    def of_run(self, folder: Path) -> RemoteFolder:
        """The folder of one of its runs; to be called before the run goes on."""
        name = folder.resolve().relative_to(self.folder.resolve()).as_posix()
        return RemoteFolder(f"{self.url}/{name}", folder)


class Copying(Observer):
    """Copies each committed round to the URL. If it cannot be written to, that is tried again after the next round."""

    def __init__(self, remote: RemoteFolder) -> None:
        self.name = f"copying to {remote.url}"
        self._remote = remote

    def round_ends(self, commit: Commit) -> None:
        """Copy what changed."""
        self.copy()

    def copy(self) -> None:
        """The same, whatever it was that changed."""
        try:
            self._remote.copy()
        except RunFolderError as error:
            logger.warning("%s; it is tried again after the next round", error)


def is_url(place: str | Path) -> bool:
    """Whether a run's folder is at a URL."""
    return "://" in str(place)


def check_free(place: str | Path) -> None:
    """Check that a new run can have a folder, or a URL.

    Raises:
        RunFolderError: There is something already, or it cannot be read.
    """
    if is_url(place):
        RemoteFolder(str(place)).check_free()
    else:
        RunFolder.check_free(Path(place))


def locate(place: str | Path, *, new: bool = False) -> tuple[Path, RemoteFolder | None]:
    """The local folder of a run and, if `place` is a URL, the folder there, from which what there is was fetched.

    Args:
        place: A folder or a URL.
        new: Whether the run has yet to begin; then the URL must be free.

    Raises:
        RunFolderError: See `RemoteFolder`, `RemoteFolder.check_free` and `RemoteFolder.fetch`.
    """
    if not is_url(place):
        return Path(place), None
    remote = RemoteFolder(str(place))
    if new:
        remote.check_free()
    else:
        remote.fetch()
    return remote.folder, remote


def locate_study(place: str | Path, settings: str, runs: str) -> tuple[Path, RemoteStudy | None]:
    """The local folder of a study and, if `place` is a URL, the folder there, from which what there is was fetched.

    Args:
        place: A folder or a URL, of the study or free.
        settings: See `RemoteStudy`.
        runs: See `RemoteStudy`.

    Raises:
        RunFolderError: See `RemoteStudy.go_on`.
    """
    if not is_url(place):
        return Path(place), None
    remote = RemoteStudy(str(place), settings, runs)
    remote.go_on()
    return remote.folder, remote


def copying(remote: RemoteFolder | None) -> list[Observer]:
    """The observer that copies each round of a run at a URL; none of a run that is elsewhere."""
    return [Copying(remote)] if remote else []
