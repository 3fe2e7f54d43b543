"""A server that speaks what huggingface_hub needs to create a repository and upload a folder to it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """The repository `me/mine`, empty at first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: dict[str, Any] | None = None
        self.message = ""
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    def reply(self, path: str, body: bytes) -> dict[str, Any] | None:
        """Return the answer to a request, or None if the hub has no such path."""
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return {}
        match path.removeprefix("/api").removeprefix("/models"):
            case "/repos/create":
                self.created = json.loads(body)
                return {"url": f"{self.address}/me/mine"}
            case "/validate-yaml":
                assert json.loads(body)["content"].startswith("---\n")
                return {"errors": [], "warnings": []}
            case "/me/mine/preupload/main":
                return {"files": [_mode(file["path"]) for file in json.loads(body)["files"]]}
            case "/me/mine.git/info/lfs/objects/batch":
                return {"transfer": "basic", "objects": [self._blob(blob) for blob in json.loads(body)["objects"]]}
            case "/me/mine/commit/main":
                self._commit([json.loads(line) for line in body.splitlines()])
                return {"commitUrl": f"{self.address}/me/mine/commit/{'a' * 40}", "commitOid": "a" * 40}
        return None

    def _blob(self, blob: dict[str, Any]) -> dict[str, Any]:
        return {**blob, "actions": {"upload": {"href": f"{self.address}/blob/{blob['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.message = value["summary"]
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.files[value["path"]] = blob = self.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.reply(self.path, body)
        if self.path.startswith("/api/"):
            self.server.tokens.add(self.headers["Authorization"])
        content = json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub on this machine until the block ends."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
