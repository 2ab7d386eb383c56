"""A model hub on this machine: repositories with commits, and as much of the hub's HTTP as downloads ask for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories by kind and name, `models/org/name` or `datasets/org/name`.

    Attributes:
        address: Of the server.
        commits: Files of each commit by its sha.
        branches: Commit of each branch or tag.
        asked: Paths that were asked for.
    """

    address: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

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
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        ):
            kind, name, what, revision, _ = match.groups()
            found = self.hub.at(f"{kind}/{name}", revision or "main")
            self._json(found and self._described(name, what, *found, body))
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            found = self.hub.at(f"{kind or 'models/'}{name}", revision)
            if found is None or file not in found[1]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})
            else:
                self._send(200, found[1][file], {"ETag": f'"{_oid(found[1][file])}"', "X-Repo-Commit": found[0]})
        else:
            self._json(None)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _described(self, name: str, what: str | None, sha: str, files: Files, body: bytes) -> Any:
        entries = [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()]
        if what == "tree":
            return entries
        if what == "paths-info":
            wanted = json.loads(body)["paths"]
            return [entry for entry in entries if entry["path"] in wanted]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings}

    def _json(self, value: Any) -> None:
        if value is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


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
