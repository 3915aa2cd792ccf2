"""Local server that answers the requests by which huggingface_hub creates a repository and uploads files."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_this_test"


class FakeHub:
    """State of the server: its repositories, and the status of requests that it refuses."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refused: dict[str, int] = {}
        """HTTP status by the end of a path."""
        self.requests: list[str] = []
        self.address = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON of a request."""
        self.requests.append(f"{method} {path}")
        for end, status in self.refused.items():
            if path.endswith(end):
                return status, {"error": "refused by the test"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            sent = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **sent} for file in files]}
        if path.endswith("/commit/main"):
            return self._commit(name, body)
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "private": self.private[name], "tags": [], "siblings": []}

    def _create(self, given: dict[str, Any]) -> tuple[int, Any]:
        name = f"{given.get('organization') or 'me'}/{given['name']}"
        address = {"url": f"{self.address}/{name}"}
        if name in self.repos:
            return 409, {"error": "You already created this model repo", **address}
        self.repos[name] = {}
        private = given.get("private", given.get("visibility") == "private")
        self.private[name] = bool(private)
        return 200, address

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = "0" * 40
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{oid}", "commitOid": oid, "success": True}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run the server at a free port of this machine."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, found = hub.answer(self.command, path, self.headers.get("Authorization", ""), body)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
