"""A model hub on this machine: the few calls that the hub's client makes of a repository, counted.

A repository is a list of commits, each a folder of files; `main` is the last of them, or what `branches` says. Files of
64 kB and more are "large": their digest is their SHA-256, as it is on the hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest

LARGE = 64 << 10


class Hub:
    """What the server has, and what it was asked.

    Attributes:
        repositories: id -> {commit: folder}.
        branches: id -> {branch or tag: commit}.
        status: what it answers everything with, if not 200 (an outage, a gate, ...), and the error code that says why.
        asked: "METHOD path" of each request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.status, self.code = 200, ""
        self.asked: list[str] = []

    def push(self, name: str, folder: Path, branch: str = "main") -> str:
        """A new commit of that content; the branch moves to it."""
        commits = self.repositories.setdefault(name, {})
        commit = hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest()
        commits[commit] = folder
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def commit(self, name: str, revision: str) -> str | None:
        known = self.branches.get(name, {}).get(revision, revision)
        return known if known in self.repositories.get(name, {}) else None

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {line.rsplit("/", 1)[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line}


def describe_file(folder: Path, path: Path) -> dict[str, object]:
    content = path.read_bytes()
    found: dict[str, object] = {
        "rfilename": str(path.relative_to(folder)),
        "size": len(content),
        "blobId": hashlib.sha1(content).hexdigest(),
    }
    if len(content) >= LARGE:
        found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.status != 200:
                return self.reply(hub.status, b"{}", {"X-Error-Code": hub.code} if hub.code else {})
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.about("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def about(self, name: str, revision: str) -> None:
            commit = hub.commit(name, revision)
            if name not in hub.repositories:
                return self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if commit is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            folder = hub.repositories[name][commit]
            files = [describe_file(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
            content = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": files}
            return self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def file(self, name: str, revision: str, file: str) -> None:
            commit = hub.commit(name, revision)
            if commit is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            headers = {"X-Repo-Commit": commit}
            path = hub.repositories[name][commit] / file
            if not path.is_file():
                return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", **headers})
            content = path.read_bytes()
            digest = hashlib.sha256(content) if len(content) >= LARGE else hashlib.sha1(content)
            headers |= {"ETag": f'"{digest.hexdigest()}"', "Content-Type": "application/octet-stream"}
            return self.reply(200, content, headers)

        def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of a server of the hub's content."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def use(patch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Make the client, which reads its environment when it is imported, talk to that address."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
