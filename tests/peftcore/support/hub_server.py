"""A server of the parts of the hub's HTTP interface that models, adapters and data sets need: tests have no network."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub


def commit_id(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class Repository:
    """The commits of one model repository: {revision: {path: content}}."""

    def __init__(self) -> None:
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.gated = False
        self.private = False
        self.messages: list[str] = []

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "files") -> str:
        self.messages.append(message)
        commit = commit_id(f"{branch}{len(self.messages)}{message}")
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def resolved(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.resolved(revision)
        return {} if commit is None else self.commits[commit]


class HubServer:
    """The server; `repositories` may be changed while it runs, and `requests` holds (method, path) of each request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.token = "hf_right"
        self.broken: set[str] = set()
        """Names of files whose download ends half-way."""
        self.status: int | None = None
        """Status of every answer, if set."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def add(self, repo_id: str, folder: Path, branch: str = "main", inside: str = "") -> Repository:
        """Publish the files of a folder, beside those that are there."""
        repository = self.repositories.setdefault(repo_id, Repository())
        files = {
            inside + file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        repository.commit({**repository.files(branch), **files}, branch)
        return repository

    def downloaded(self) -> list[str]:
        """Return the names of the files that were sent."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in paths]

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(("POST", path))
        if self.hub.status is not None:
            return self._send(self.hub.status, {"error": "no"})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "no token"})
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wish = json.loads(content)
            repo_id = f"{wish.get('organization') or 'me'}/{wish['name']}"
            is_new = repo_id not in self.hub.repositories
            repository = self.hub.repositories.setdefault(repo_id, Repository())
            if not is_new:
                return self._send(409, {"error": "it exists", "url": f"{self.hub.url}/{repo_id}"})
            repository.private = wish.get("visibility") == "private" or bool(wish.get("private"))
            repository.commit({}, message="initial commit")
            return self._send(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})
        repo_id = "/".join(parts[2:4])
        repository = self.hub.repositories[repo_id]
        if parts[4] == "branch":
            if parts[5] in repository.branches:
                return self._send(409, {"error": "it exists"})
            repository.commit(repository.files(), parts[5], "branch")
            return self._send(200, {})
        if parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(content)["files"]
            ]
            return self._send(200, {"files": files})
        if parts[4] == "commit":
            return self._commit(repository, repo_id, parts[5], content)
        return self._send(404, {"error": "not served"})

    def _commit(self, repository: Repository, repo_id: str, branch: str, content: bytes) -> None:
        files, message = dict(repository.files(branch)), ""
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        answer = {}
        if parse_qs(urlsplit(self.path).query).get("create_pr"):
            branch = "refs/pr/1"
            answer = {"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"}
        commit = repository.commit(files, branch, message)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, **answer})

    def _get(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(("GET" if body else "HEAD", path))
        if self.hub.status is not None:
            return self._send(self.hub.status, {"error": "no"}, body=body)
        path = path.replace("/datasets/", "/models/" if path.startswith("/api/") else "/", 1)
        is_api, is_tree = path.startswith("/api/models/"), "/tree/" in path
        head, _, tail = path.removeprefix("/api/models/" if is_api else "/").partition(
            "/tree/" if is_tree else "/revision/" if is_api else "/resolve/"
        )
        repository = self.hub.repositories.get(head)
        has_token = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not has_token):
            code = {} if self.headers.get("Authorization") is None else {"X-Error-Code": "RepoNotFound"}
            return self._send(404 if code else 401, {"error": "Repository not found"}, code, body)
        if repository.gated and not has_token:
            return self._send(
                403 if self.headers.get("Authorization") else 401, {}, {"X-Error-Code": "GatedRepo"}, body
            )
        revision, _, name = tail.partition("/")
        commit = repository.resolved(revision or "main")
        if commit is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}, body)
        if is_tree:  # transformers lists a folder of chat templates, and datasets the whole repository
            files = [file for file in repository.files(commit) if not name or file.startswith(f"{name}/")]
            listing = [{"type": "file", "path": file, "size": 1, "oid": commit} for file in files]
            if not files:
                return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, body)
            return self._send(200, listing, body=body)
        if is_api:
            siblings = [{"rfilename": file} for file in repository.files(commit)]
            return self._send(200, {"id": head, "sha": commit, "siblings": siblings}, body=body)
        content = repository.files(commit).get(name)
        if content is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._send(404, {"error": "Entry not found"}, code, body)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._send(200, content, headers, body, len(content) // 2 if body and name in self.hub.broken else None)

    def _send(
        self,
        status: int,
        content: Any,
        headers: dict[str, str] | None = None,
        body: bool = True,
        stop_after: int | None = None,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:stop_after])
        if stop_after is not None:
            self.close_connection = True


def use(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `huggingface_hub` in this process use the server, as HF_ENDPOINT does when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made anew, with the server's address
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
