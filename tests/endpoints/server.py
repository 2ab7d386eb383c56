"""A small OpenAI-compatible server: it answers by a function, and speaks the protocol over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "small"
Body = dict[str, Any]


def echo(body: Body) -> str:
    """What was asked, after how many turns."""
    return f"{body['messages'][-1]['content']} ({len(body['messages'])})"


def completion(content: str | None, *, finish: str = "stop", refusal: str | None = None, usage: bool = True) -> Body:
    """A reply as the API gives it."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    reply: Body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
    }
    return reply | ({"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}} if usage else {})


class Server(ThreadingHTTPServer):
    """Answers /v1/chat/completions, and does as a provider with files and fine-tuning jobs.

    Attributes:
        answer: Makes an answer of a request's body; it may return a whole reply instead.
        key: The key that is wanted; None: any or none.
        asked: Bodies of all chat requests, in the order in which they came.
        most_at_once: The most of them that were under way at the same time.
        files: Uploaded files, as they were sent.
        jobs: Fine-tuning jobs, by id.
        outcome: How jobs end.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[Body], str | Body] = echo, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.key = key
        self.asked: list[Body] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.files: list[bytes] = []
        self.jobs: dict[str, Body] = {}
        self.outcome: Body = {"status": "succeeded", "trained_tokens": 1000}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        given = self.headers["Authorization"]
        if self.server.key is not None and given != f"Bearer {self.server.key}":
            shown = (given or "").removeprefix("Bearer ")
            shown = f"{shown[:7]}{'*' * 8}{shown[-4:]}"
            self.reply(401, {"error": {"message": f"Incorrect API key provided: {shown}.", "code": "invalid_api_key"}})
        elif self.path == "/v1/chat/completions":
            self.chat(json.loads(data))
        elif self.path == "/v1/files":
            self.server.files.append(data)
            self.reply(200, {"id": f"file-{len(self.server.files)}", "object": "file", "bytes": len(data),
                             "created_at": 1, "filename": "examples.jsonl", "purpose": "fine-tune",
                             "status": "processed"})  # fmt: skip
        elif self.path == "/v1/fine_tuning/jobs":
            asked, number = json.loads(data), len(self.server.jobs) + 1
            job = {"id": f"ftjob-{number}", "object": "fine_tuning.job", "created_at": 1, "status": "running",
                   "model": asked["model"], "training_file": asked["training_file"], "seed": asked["seed"],
                   "fine_tuned_model": None, "error": None, "hyperparameters": {}, "organization_id": "o",
                   "result_files": [], "trained_tokens": None, "validation_file": None, "finished_at": None,
                   "polls": 0}  # fmt: skip
            self.server.jobs[f"ftjob-{number}"] = job
            self.reply(200, job)
        else:
            self.reply(404, {"error": {"message": f"there is no {self.path}"}})

    def do_GET(self) -> None:
        job = self.server.jobs[self.path.rsplit("/", 1)[1]]
        job["polls"] += 1
        if job["polls"] > 1:
            job |= self.server.outcome
            if job["status"] == "succeeded":
                job["fine_tuned_model"] = f"ft:{job['model']}:{job['id']}"
        self.reply(200, job)

    def chat(self, body: Body) -> None:
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            if body["model"] != MODEL and not body["model"].startswith("ft:"):
                error = {"message": f"The model {body['model']} does not exist", "code": "model_not_found"}
                self.reply(404, {"error": error})
            else:
                made = server.answer(body)
                status = made.pop("status", 200) if isinstance(made, dict) else 200
                self.reply(status, completion(made) if isinstance(made, str) else made)
        finally:
            with server.lock:
                server.at_once -= 1

    def reply(self, status: int, value: Body) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[Any]:
    """Run a server in a thread of its own while the block lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
