"""A small Hugging Face Hub on this machine, in the standard library: reading, and plain commits.

    with HubServer() as hub:
        hub.add("user/model", folder)
        subprocess.run(..., env=hub.environment(cache))

The real huggingface_hub talks to it. Its endpoint and cache are read from the environment when it is
imported, which is why tests run it in a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits, oldest first, and what branches and tags point at."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        text = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """Serves repositories until the with-block ends. ``requests`` lists what was asked, as "GET /path"."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.tokens: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, folder: Path | Files, *, branch: str = "main", gated: bool = False) -> str:
        """Commits a folder's files (or bytes by name); the commit's hash."""
        if isinstance(folder, Path):
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        else:
            files = dict(folder)
        stored = self.repos.setdefault(repo, Repo())
        stored.gated = gated
        return stored.commit(files, branch)

    def environment(self, cache: Path, **extra: str) -> dict[str, str]:
        """The environment of a process that takes this server for the Hub, with its own cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **extra,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    # -- answers

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, values: Any, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _open(self, name: str) -> Repo | None:
        """The repository, or None when the answer has been an error."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(404, "RepoNotFound")
        elif repo.gated:
            self._error(403, "GatedRepo")
            return None
        return repo

    def _record(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.append(self.headers.get("Authorization", ""))
        return path.strip("/").split("/")

    # -- reading

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self._record()
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "EntryNotFound")

    def _describe(self, name: str, rest: list[str]) -> None:
        if (repo := self._open(name)) is None:
            return None
        revision = rest[1] if len(rest) > 1 else "main"
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound")
        files = repo.commits[sha]
        if rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self._json(listing)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def _file(self, name: str, revision: str, path: str) -> None:
        if (repo := self._open(name)) is None:
            return None
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound")
        data = repo.commits[sha].get(path)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        etag = hashlib.sha256(data).hexdigest()
        return self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    # -- writing: every file is "regular", so no large-file storage is needed

    def do_POST(self) -> None:
        parts = self._record()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            owner = wanted.get("organization") or "user"
            name = f"{owner}/{wanted['name']}"
            status = 409 if name in self.hub.repos else 200
            self.hub.repos.setdefault(name, Repo())
            return self._json({"url": f"{self.hub.url}/{name}"}, status)
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": answer})
        if parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
            return self._commit("/".join(parts[2:4]), parts[5], body)
        return self._error(404, "EntryNotFound")

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.commits.get(repo.refs.get(branch, ""), {}))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.commit(files, branch)
        self._json(
            {"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "pullRequestUrl": None}
        )
