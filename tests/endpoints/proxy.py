"""A proxy that passes requests on to an OpenAI-compatible server, counts them, and does harm where it is told to."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.endpoints.server import completion

Fault = Callable[["_Handler", bytes], None]


def status(code: int, **headers: str) -> Fault:
    """An error of the endpoint, or of something before it."""
    body = json.dumps({"error": {"message": f"fault {code}", "type": "server_error", "code": None}}).encode()
    return lambda handler, _: handler.reply(code, "application/json", body, **headers)


def html(code: int) -> Fault:
    """A page for people."""
    body = b"<html><body><h1>Bad Gateway</h1></body></html>"
    return lambda handler, _: handler.reply(code, "text/html", body)


def says(reply: Mapping[str, Any] | str) -> Fault:
    """A reply of its own: JSON, or what should have been."""
    body = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
    return lambda handler, _: handler.reply(200, "application/json", body)


def silent(handler: _Handler, _: bytes) -> None:
    """Nothing comes, until the proxy stops."""
    handler.server.stopped.wait()
    handler.close_connection = True


def cut(handler: _Handler, body: bytes) -> None:
    """The connection ends in the middle of the reply."""
    code, kind, data = handler.upstream(body)
    handler.send_response(code)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def reset(handler: _Handler, _: bytes) -> None:
    """The connection is reset without a reply."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


EMPTY = says(completion(""))
NOTHING = says(completion(None))
REFUSED = says(completion(None, refusal="I can't help with that."))
FILTERED = says(completion("half of", finish="content_filter"))
CUT_BY_LENGTH = says(completion("half of it", finish="length"))
NOT_JSON = says('{"choices": [')
OTHER_JSON = says('["nothing", "of", "use"]')
NO_CHOICES = says({"error": "overloaded"})


class Proxy(ThreadingHTTPServer):
    """Passes requests on, but for those that meet a fault.

    Args:
        upstream: Address of the server, as http://127.0.0.1:1234/v1.
        faults: Faults by number of the request, from 1; or what says, for a number and a body, which one it meets.

    Attributes:
        seen: How often each body came, by the body.
        passed: How often a reply to each body went back whole.
        keys: The keys that came.
    """

    daemon_threads = True

    def __init__(self, upstream: str, faults: Mapping[int, Fault] | Callable[[int, bytes], Fault | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(upstream)
        self.fault_of = faults if callable(faults) else lambda number, _: faults.get(number)
        self.lock = threading.Lock()
        self.number = 0
        self.seen: Counter[bytes] = Counter()
        self.passed: Counter[bytes] = Counter()
        self.keys: set[str] = set()
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def shutdown(self) -> None:
        """Stop, and let go of all that wait for a reply."""
        self.stopped.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_POST(self) -> None:
        body, proxy = self.rfile.read(int(self.headers["Content-Length"])), self.server
        with proxy.lock:
            proxy.number += 1
            proxy.seen[body] += 1
            proxy.keys.add(self.headers["Authorization"] or "")
            number = proxy.number
        if fault := proxy.fault_of(number, body):
            fault(self, body)
        else:
            self.reply(*self.upstream(body))
            with proxy.lock:
                proxy.passed[body] += 1

    def upstream(self, body: bytes) -> tuple[int, str, bytes]:
        """What the server replies."""
        target = self.server.target
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        kept = ("Authorization", "Content-Type")
        headers = {name: self.headers[name] for name in kept if self.headers[name]}
        connection.request("POST", self.path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        return reply.status, reply.headers["Content-Type"], data

    def reply(self, code: int, kind: str, data: bytes, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
