"""A server on this machine that speaks the Hugging Face Hub's protocol, as far as downloads need.

The client is the real `huggingface_hub`, told of it by HF_ENDPOINT. Repositories are directories,
`ROOT/models/OWNER/NAME/BRANCH/...`; the commit of a branch is a hash of its files.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_tests"
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+|[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?"
)
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+|[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What the server serves, and what it has been asked for."""

    root: Path
    gated: set[str] = field(default_factory=set)
    """Repositories that need `TOKEN`."""
    requests: list[str] = field(default_factory=list)
    """Methods and paths, in order."""
    url: str = ""

    def put(self, repo: str, name: str, content: bytes, *, kind: str = "models") -> None:
        """Write a file of a repository's main branch."""
        path = self.root / kind / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def files(self, repo: str, kind: str = "models") -> dict[str, bytes]:
        """Return the files of a repository by name."""
        root = self.root / kind / repo
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in paths}

    def commit(self, repo: str, kind: str = "models") -> str:
        """Return the commit of a repository's main branch; all that was ever one still is."""
        return hashlib.sha1(repr(sorted(self.files(repo, kind).items())).encode()).hexdigest()


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve the repositories below `root` at `Hub.url`."""
    hub = Hub(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := _FILE.fullmatch(path):
            self._file(match[1] or "models", match[2], match[3], match[4])
        elif match := _API.fullmatch(path):
            self._api(match[1], match[2], match[3], match[4], match[5] or "")
        else:
            self._answer(404, b"{}")

    def _refused(self, kind: str, repo: str, revision: str | None) -> bool:
        """Answer, and return True, where the repository or revision is not to be had."""
        if not (self.hub.root / kind / repo).is_dir():
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", self.hub.commit(repo, kind)):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
        if self._refused(kind, repo, revision):
            return
        head = {"X-Repo-Commit": self.hub.commit(repo, kind)}
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(403, b"{}", head | {"X-Error-Code": "GatedRepo"})
            return
        content = self.hub.files(repo, kind).get(name)
        if content is None:
            self._answer(404, b"{}", head | {"X-Error-Code": "EntryNotFound"})
            return
        head["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._answer(200, content, head)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        part = content[first : last + 1]
        head["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self._answer(206, part, head)

    def _api(self, kind: str, repo: str, what: str | None, revision: str, below: str) -> None:
        if self._refused(kind, repo, revision):
            return
        names = self.hub.files(repo, kind)
        if what == "tree":
            self._json(self._tree(names, below))
            return
        siblings = [{"rfilename": name} for name in names]
        self._json({"id": repo, "sha": self.hub.commit(repo, kind), "siblings": siblings})

    @staticmethod
    def _tree(names: dict[str, bytes], below: str) -> list[dict[str, Any]]:
        prefix = f"{below}/" if below else ""
        inside = {name: content for name, content in names.items() if name.startswith(prefix)}
        folders = {
            name[: at + len(prefix)]
            for name in inside
            if (at := name[len(prefix) :].find("/")) >= 0
        }
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders
        ]
        entries += [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for name, content in inside.items()
        ]
        return entries

    def _json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, head: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (head or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
