"""A Hub on this machine, as far as a publish needs one: the real `huggingface_hub` client talks to it.

Repositories with commits and trees, large files by hash, uploads, downloads; and faults, planted by number of
request: an error status, silence, a connection that is reset before or after the work is done. Every request
is kept, so that a test can search it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".gguf")
SILENCE_S = 30.0
REPO = r"(?:datasets/)?[^/]+/[^/]+"
Tree = dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, Tree]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def resolved(self, revision: str) -> str:
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        if commit not in dict(self.commits):
            raise Refused(404, "Invalid rev id: it does not exist", "RevisionNotFound")
        return commit

    def tree(self, revision: str) -> Tree:
        return dict(self.commits)[self.resolved(revision)]

    def commit(self, tree: Tree, message: str) -> str:
        content = json.dumps([len(self.commits), message, {p: git_oid(c) for p, c in sorted(tree.items())}])
        self.commits.append((hashlib.sha1(content.encode()).hexdigest(), tree))
        self.messages.append(message)
        return self.head


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Hub:
    """`faults` maps the number of a request, from 0, to the fault planted into it."""

    url: str
    token: str
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    faults_met: list[str] = field(default_factory=list)
    """Faults that a request ran into."""
    before: Callable[[int, Request], str | None] = lambda number, request: None
    """Called with each request; a fault that it returns is planted into that request."""
    echoes_token: bool = False
    corrupts: str | None = None
    """A path that is served with one byte changed."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def loopback(token: str) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", token)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        hub = self.hub
        body = self._body()
        request = Request(self.command, self.path, dict(self.headers.items()), body)
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append(request)
        if fault := hub.before(number, request) or hub.faults.get(number, ""):
            hub.faults_met.append(fault)
        if fault == "reset":
            return self._reset()
        if fault == "silence":
            hub.closing.wait(SILENCE_S)
            return self._reset()
        if fault in ("429", "500", "503"):
            headers = {"Retry-After": "0"} if fault == "429" else {}
            return self._answer(int(fault), {"error": self._message(f"planted {fault}")}, headers)
        try:
            with hub.lock:
                status, answer, headers = self._route(request)
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            status, answer, headers = (
                refused.status,
                {"error": self._message(refused.message), **refused.more},
                code,
            )
        if fault == "lost":  # the work is done, and the client never learns of it
            return self._reset()
        self._answer(status, answer, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve

    def _message(self, text: str) -> str:
        return f"{text}; you sent {self.headers.get('Authorization')}" if self.hub.echoes_token else text

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _answer(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, request: Request) -> tuple[int, Any, dict[str, str]]:
        url = urlsplit(request.path)
        path = unquote(url.path)
        if found := re.fullmatch(r"/objects/([0-9a-f]{64})", path):  # a store elsewhere: it sees no token
            if sha256(request.body) != found[1]:
                raise Refused(400, "content is not what its hash says")
            self.hub.objects[found[1]] = request.body
            return 200, {}, {}
        if request.headers.get("authorization", request.headers.get("Authorization")) != (
            f"Bearer {self.hub.token}"
        ):
            raise Refused(401, "Invalid username or password.")
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(request.body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(request.body)["content"])
        path = re.sub(
            "^/api/datasets/", "/api/models/datasets/", path
        )  # a data set is the repository datasets/NAME
        for pattern, answer in (
            (rf"/api/models/({REPO})", self._info),
            (rf"/api/models/({REPO})/revision/(.+)", self._info),
            (rf"/api/models/({REPO})/tree/([^/]+)", self._tree),
            (rf"/api/models/({REPO})/tree/([^/]+)/(.+)", self._tree),
            (rf"/api/models/({REPO})/paths-info/([^/]+)", self._paths),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (rf"/({REPO})/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if found := re.fullmatch(pattern, path):
                repo = self.hub.repos.get(found[1])
                if repo is None:
                    raise Refused(404, "Repository not found", "RepoNotFound")
                return answer(found[1], repo, request, *found.groups()[1:])
        raise Refused(404, f"this hub has no {path} {parse_qs(url.query)}")

    def _create(self, options: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{options.get('organization') or 'me'}/{options['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        repo = self.hub.repos[name] = Repo(
            options.get("visibility") == "private" or bool(options.get("private"))
        )
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def _validate(self, content: str) -> tuple[int, Any, dict[str, str]]:
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            fields = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        wrong = [
            name for name in ("license", "model-index") if not isinstance(fields, dict) or name not in fields
        ]
        if wrong:
            return 400, {"errors": [{"message": f'"{wrong[0]}" is required'}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": [{"message": "a remark of the hub"}]}, {}

    def _info(self, name: str, repo: Repo, request: Request, revision: str = "main") -> Any:
        sha = repo.resolved(revision)
        return 200, {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": []}, {}

    def _tree(self, name: str, repo: Repo, request: Request, revision: str, folder: str = "") -> Any:
        inside = f"{folder}/" if folder else ""
        tree = {path: content for path, content in repo.tree(revision).items() if path.startswith(inside)}
        if not tree:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if "recursive=true" in request.path.lower():
            return 200, [_entry(path, content) for path, content in sorted(tree.items())], {}
        files = [_entry(path, content) for path, content in tree.items() if "/" not in path[len(inside) :]]
        folders = {path[: path.index("/", len(inside))] for path in tree if "/" in path[len(inside) :]}
        return 200, files + [_folder(path) for path in sorted(folders)], {}

    def _paths(self, name: str, repo: Repo, request: Request, revision: str) -> Any:
        asked = json.loads(request.body)["paths"]
        tree = repo.tree(revision)
        files = [_entry(path, tree[path]) for path in asked if path in tree]
        folders = [path for path in asked if any(each.startswith(f"{path}/") for each in tree)]
        return 200, files + [_folder(path) for path in folders], {}

    def _preupload(self, name: str, repo: Repo, request: Request, revision: str) -> Any:
        there = repo.tree(revision)
        files = []
        for file in json.loads(request.body)["files"]:
            path, content = file["path"], there.get(file["path"])
            large = path.endswith(LARGE)
            oid = None if content is None else (sha256(content) if large else git_oid(content))
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def _batch(self, name: str, repo: Repo, request: Request) -> Any:
        objects = []
        for one in json.loads(request.body)["objects"]:
            href = f"{self.hub.url}/objects/{one['oid']}"
            there = one["oid"] in self.hub.objects
            objects.append(one if there else one | {"actions": {"upload": {"href": href, "header": {}}}})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _commit(self, name: str, repo: Repo, request: Request, revision: str) -> Any:
        tree, header = dict(repo.tree("main")), {}
        for line in request.body.splitlines():
            one = json.loads(line)
            key, value = one["key"], one["value"]
            if key == "header":
                header = value
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"{value['path']}: its content was never uploaded")
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        if header.get("parentCommit") not in (None, repo.head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        oid = repo.commit(tree, header["summary"])
        return (
            200,
            {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""},
            {},
        )

    def _resolve(self, name: str, repo: Repo, request: Request, revision: str, path: str) -> Any:
        tree = repo.tree(revision)
        if path not in tree:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = tree[path]
        if path == self.hub.corrupts:
            content = bytes([content[0] ^ 1]) + content[1:]
        large = path.endswith(LARGE)
        etag = sha256(tree[path]) if large else git_oid(tree[path])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.resolved(revision), "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(
            r"bytes=(\d+)-(\d+)", request.headers.get("Range") or request.headers.get("range", "")
        )
        if wanted is not None:
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            where = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            return 206, content[first : last + 1], headers | where
        return 200, content, headers | {"X-Linked-Size": str(len(content))}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry
