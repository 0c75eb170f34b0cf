"""A small Hugging Face Hub on this machine, in the standard library: reading, commits, large files.

    with HubServer() as hub:
        hub.add("user/model", folder)
        subprocess.run(..., env=hub.environment(cache))

    hub.owners = {"hf_token": "user"}    # who may write what; None lets everybody
    hub.lfs_from = 10_000                # files of this size and more go through git-lfs

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
    private: bool = False

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
        self.owners: dict[str, str] | None = None
        self.lfs_from: int | None = None
        self.large: dict[str, bytes] = {}
        """What git-lfs has taken, by SHA-256."""
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
        return self._json({"id": name, "sha": sha, "siblings": siblings, "tags": [], "private": repo.private})

    def _file(self, name: str, revision: str, path: str) -> None:
        if (repo := self._open(name)) is None:
            return None
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound")
        data = repo.commits[sha].get(path)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        large = hashlib.sha256(data).hexdigest()
        small = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        etag = large if large in self.hub.large else small  # as the Hub: git's own hash of small files
        return self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    # -- writing

    def do_POST(self) -> None:
        parts = self._record()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._lfs_batch(json.loads(body))
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            name, action, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            if not self._may_write(name):
                return None
            if action == "preupload":
                return self._preupload(json.loads(body)["files"])
            if action == "commit":
                return self._commit(name, revision, body)
            if action == "branch":
                return self._branch(name, revision)
        return self._error(404, "EntryNotFound")

    def do_PUT(self) -> None:
        """A large file's content, where the batch answer said."""
        parts = self._record()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hashlib.sha256(data).hexdigest() != parts[-1]:
            return self._error(400, "BadRequest")
        self.hub.large[parts[-1]] = data
        return self._send(200, b"")

    def _may_write(self, name: str) -> bool:
        """Whether the token's owner owns the repository; if not, the answer has been an error."""
        if self.hub.owners is None:
            return True
        asks = "create_pr=1" in urlsplit(self.path).query  # everybody may open a pull request
        owner = self.hub.owners.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if owner is None:
            message = "Invalid credentials in Authorization header"
            self._send(401, b"", {"X-Error-Message": message})
        elif owner != name.split("/")[0] and not asks:
            self._send(403, b"", {"X-Error-Message": "Forbidden"})
        else:
            return True
        return False

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if not self._may_write(name):
            return None
        status = 409 if name in self.hub.repos else 200
        if status == 200:  # the Hub's own first commit
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.hub.repos[name].private = wanted.get("private") or wanted.get("visibility") == "private"
        return self._json({"url": f"{self.hub.url}/{name}"}, status)

    def _branch(self, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        if branch in repo.refs:
            return self._json({"error": "Reference already exists"}, 409)
        repo.refs[branch] = repo.refs["main"]
        return self._json({})

    def _preupload(self, files: list[dict[str, Any]]) -> None:
        limit = self.hub.lfs_from
        modes = {f["path"]: "regular" if limit is None or f["size"] < limit else "lfs" for f in files}
        answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._json({"files": answer})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        """Where each object goes; one that is there already has no actions."""
        objects = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            known = item["oid"] in self.hub.large
            objects.append({**item, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.commits.get(repo.refs.get(branch, ""), {}))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit")
                if parent not in (None, repo.refs.get(branch)):
                    return self._send(412, b"", {"X-Error-Message": "A commit has happened since"})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        wants_pr = "create_pr=1" in urlsplit(self.path).query
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        sha = repo.commit(files, f"refs/pr/{number}" if wants_pr else branch)
        url = f"{self.hub.url}/{name}"
        pull_request = f"{url}/discussions/{number}" if wants_pr else None
        return self._json(
            {"commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "pullRequestUrl": pull_request}
        )
