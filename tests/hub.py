"""A model hub on this machine: repositories with commits, and as much of the hub's HTTP as downloads ask for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories by kind and name, `models/org/name` or `datasets/org/name`.

    Attributes:
        address: Of the server.
        commits: Files of each commit by its sha.
        branches: Commit of each branch or tag.
        asked: Paths that were asked for.
        gated: Repositories that want a token.
        cuts: How often the download of a file is still going to be cut off in its middle, by path in its repository.
    """

    address: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, int] = field(default_factory=dict)

    def push(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Make the files of a folder the newest commit of a branch; its sha."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repository, {})[sha] = files
        self.branches.setdefault(repository, {})[branch] = sha
        return sha

    def at(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """Sha and files of a branch or commit."""
        sha = self.branches.get(repository, {}).get(revision, revision)
        files = self.commits.get(repository, {}).get(sha)
        return None if files is None else (sha, files)


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        address = urlsplit(self.path)
        path, deep = unquote(address.path), "recursive=true" in address.query.lower()
        self.hub.asked.append(path)
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        ):
            kind, name, what, revision, below = match.groups()
            if self._refused(f"{kind}/{name}"):
                return
            found = self.hub.at(f"{kind}/{name}", revision or "main")
            self._json(found and self._described(name, what, *found, body, below or "", deep))
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            repository = f"{kind or 'models/'}{name}"
            if self._refused(repository):
                return
            found = self.hub.at(repository, revision)
            if found is None or file not in found[1]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})
            else:
                self._file(file, found[1][file], found[0])
        else:
            self._json(None)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _refused(self, repository: str) -> bool:
        refused = repository in self.hub.gated and self.headers.get("Authorization") != "Bearer hf_let_me_in"
        if refused:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"{repository} is gated"})
        return refused

    def _file(self, file: str, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and self.hub.cuts.get(file, 0) > 0
        if cut:
            self.hub.cuts[file] -= 1
        self._send(206 if begin else 200, content[begin:], headers, cut=cut)

    def _described(
        self, name: str, what: str | None, sha: str, files: Files, body: bytes, below: str, deep: bool
    ) -> Any:
        entries = [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()]
        if what == "tree":
            return _tree(entries, f"{below}/" if below else "", deep)
        if what == "paths-info":
            wanted = parse_qs(body.decode())["paths"] if not body.startswith(b"{") else json.loads(body)["paths"]
            folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
            entries += [{"type": "directory", "path": path, "oid": sha} for path in folders]
            return [entry for entry in entries if entry["path"] in wanted]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings}

    def _json(self, value: Any) -> None:
        if value is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _tree(entries: list[dict[str, Any]], below: str, deep: bool) -> list[dict[str, Any]]:
    """Entries in a folder; unless `deep`, folders in it stand for what they hold."""
    inside = [entry for entry in entries if entry["path"].startswith(below)]
    if deep:
        return inside
    here = [entry for entry in inside if "/" not in entry["path"].removeprefix(below)]
    folders = {entry["path"].removeprefix(below).partition("/")[0] for entry in inside if entry not in here}
    return here + [{"type": "directory", "path": below + folder, "oid": folder} for folder in sorted(folders)]


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while this lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
