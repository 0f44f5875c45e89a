"""A stand-in for the Hugging Face Hub on the loopback device: what fetching and uploading a model use of its HTTP API.

It is no hub: it has no xet, no branches and no history. What clients ask for is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


@dataclass
class Repository:
    """A model repository with one commit, `main`. Where `token` is set, only its bearer may read."""

    files: dict[str, bytes]
    token: str = ""
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the stand-in.

    Attributes:
        repositories: by `org/name`.
        users: by token, what `whoami` answers its bearer: `{"name": ..., "orgs": [{"name": ...}]}`.
        objects: contents of large files by their SHA-256; they are there before a commit names them.
        faults: (method, path) -> the status that is answered instead.
        delays_seconds: last part of a path -> how long its content is waited for.
        requests: (method, path, status) in the order of the answers.
        url: where it listens.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[tuple[str, str], int] = field(default_factory=dict)
    delays_seconds: dict[str, float] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    url: str = ""

    def downloaded(self) -> list[str]:
        """The files whose content was sent, sorted."""
        gets = [path for method, path, status in self.requests if method == "GET" and status == 200]
        return sorted(path.partition("/resolve/")[2].partition("/")[2] for path in gets if "/resolve/" in path)

    def received(self) -> list[str]:
        """The SHA-256 of the large files that were taken, sorted."""
        return sorted(
            p.removeprefix("/lfs/") for method, p, status in self.requests if (method, status) == ("PUT", 200)
        )

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """This process's environment for a client of this hub, whose files are below `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home)}
        return kept | ours | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        fault = self.hub.faults.get((self.command, path))
        if self.command != "HEAD":
            time.sleep(self.hub.delays_seconds.get(path.rpartition("/")[2], 0))
        if fault is not None:
            return self._send(fault, b'{"error": "as the test wants it"}')
        if self.command in ("POST", "PUT"):
            return self._take(path, body)
        if path == "/api/whoami-v2":
            user = self.hub.users.get(self._token())
            return self._json(user) if user else self._send(401)
        return self._answer(path)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self, path: str) -> None:
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        name, (what, revision, *rest) = "/".join(parts[:2]), [*parts[2:4], "", ""][:2] + parts[4:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repository.token and self._token() != repository.token:
            code = "GatedRepo" if repository.gated else "RepoNotFound"
            return self._send(403 if repository.gated else 401, b"{}", {"X-Error-Code": code})
        if revision not in ("", "main", repository.commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return self._json(_describe(name, what, repository))
        content = repository.files.get("/".join(rest))
        if what != "resolve" or content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
        return self._send(200, content, headers)

    def _take(self, path: str, body: bytes) -> None:
        user = self.hub.users.get(self._token())
        if path.startswith("/lfs/"):  # the address is the permission
            self.hub.objects[path.removeprefix("/lfs/")] = body
            return self._send(200 if hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/") else 400)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if user is None:
            return self._send(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body), user)
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, what = "/".join(parts[:2]), parts[2]
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json(self._missing(json.loads(body)["objects"]))
        repository = self.hub.repositories[name]
        if what == "preupload":
            return self._json({"files": [_upload_mode(file["path"], repository) for file in json.loads(body)["files"]]})
        assert what == "commit", path
        for line in body.splitlines():
            change = json.loads(line)
            self._change(repository, change["key"], change["value"])
        address = f"{self.hub.url}/{name}/commit/{repository.commit}"
        return self._json({"commitUrl": address, "commitOid": repository.commit, "pullRequestUrl": None})

    def _create(self, wanted: dict[str, Any], user: dict[str, Any]) -> None:
        namespace = wanted.get("organization") or user["name"]
        name = f"{namespace}/{wanted['name']}"
        if namespace not in (user["name"], *(org["name"] for org in user.get("orgs", []))):
            return self._send(403, b'{"error": "not a member"}')
        is_new = name not in self.hub.repositories
        if is_new:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            token = self._token() if private else ""
            self.hub.repositories[name] = Repository({}, token=token, private=private)
        return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 200 if is_new else 409)

    def _missing(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        """Where to send each object; nowhere, if it is here."""
        answers = []
        for asked in objects:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            answers.append(asked if asked["oid"] in self.hub.objects else asked | {"actions": upload})
        return {"transfer": "basic", "objects": answers}

    def _change(self, repository: Repository, kind: str, value: dict[str, Any]) -> None:
        if kind == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            repository.files[value["path"]] = self.hub.objects[value["oid"]]
        elif kind == "deletedFile":
            del repository.files[value["path"]]

    def _token(self) -> str:
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, answer: object, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.hub.requests.append((self.command, self.path.partition("?")[0], status))
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for key, value in sent.items():
            self.send_header(key, value)
        with suppress(BrokenPipeError, ConnectionResetError):  # the client may have gone
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)


def _upload_mode(path: str, repository: Repository) -> dict[str, Any]:
    """Weights go the way of large files."""
    content = repository.files.get(path)
    oid = None if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _describe(name: str, what: str, repository: Repository) -> object:
    if what == "tree":
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.files.items()
        ]
    files = [{"rfilename": path} for path in repository.files]
    return {"_id": "x", "id": name, "modelId": name, "private": repository.private, "sha": repository.commit,
            "siblings": files, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip


def pythons() -> list[str]:
    """This Python; and, where it is set up, one with transformers 4 and the huggingface_hub that belongs to it."""
    older = os.environ.get("DIST_CONVERT_TRANSFORMERS_4_PYTHON")
    return [sys.executable, *([older] if older else [])]


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
