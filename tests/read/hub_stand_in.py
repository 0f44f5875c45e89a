"""A stand-in for the Hugging Face Hub: the part of its HTTP API that fetching a model uses, on the loopback device.

It is no hub: it has no users, no LFS and no xet. What clients ask for is kept in `requests`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Repository:
    """A model repository with one commit, `main`. Where `token` is set, only its bearer may read."""

    files: dict[str, bytes]
    token: str = ""
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by `org/name`; `requests` are (method, path, status) in the order of their answers."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    url: str = ""

    def downloaded(self) -> list[str]:
        """The files whose content was sent, sorted."""
        gets = [path for method, path, status in self.requests if method == "GET" and status == 200]
        return sorted(path.partition("/resolve/")[2].partition("/")[2] for path in gets if "/resolve/" in path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self.path.partition("?")[0])

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, path: str) -> None:
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        name, (what, revision, *rest) = "/".join(parts[:2]), [*parts[2:4], "", ""][:2] + parts[4:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            code = "GatedRepo" if repository.gated else "RepoNotFound"
            return self._send(403 if repository.gated else 401, b"{}", {"X-Error-Code": code})
        if revision not in ("", "main", repository.commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return self._send(200, json.dumps(_describe(name, what, repository)).encode(), {})
        content = repository.files.get("/".join(rest))
        if what != "resolve" or content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
        return self._send(200, content, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path.partition("?")[0], status))
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _describe(name: str, what: str, repository: Repository) -> object:
    if what == "tree":
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.files.items()
        ]
    files = [{"rfilename": path} for path in repository.files]
    return {"_id": "x", "id": name, "modelId": name, "private": False, "sha": repository.commit, "siblings": files,
            "tags": [], "downloads": 0, "likes": 0}  # fmt: skip


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer for the hub at `hub.url` until the block is left."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
