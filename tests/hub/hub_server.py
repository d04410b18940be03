"""A server on loopback that speaks the part of the Hub's protocol that pushing and loading a model use.

Standard library only. It keeps repositories in memory, asks for tokens, checks the metadata of model cards against
the rules that the Hub publishes, and fails on request: with a status, or by cutting the connection.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic as _clock
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_card_rules import card_problems

# Token: its user, and whether it may write.
TOKENS = {"hf_writes": ("ada", True), "hf_reads": ("ada", False)}
LARGE = (".safetensors", ".pt", ".pth", ".bin", ".png")
CUT, LOSE = 0, -1
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    oid: str = ""

    def __post_init__(self) -> None:
        self.oid = hashlib.sha1(repr((self.message, sorted(self.files.items()))).encode()).hexdigest()


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})]}
    )

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass(frozen=True)
class Answer:
    """An answer of a misbehaving server.

    Args:
        status (`int`): of the answer.
        body (`bytes`): its content.
        headers (`dict[str, str]`): further ones.
        pause (`float`): seconds before each byte of the body.
        endless (`bool`): the body is repeated until the client hangs up.
        silent (`bool`): nothing is sent.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    endless: bool = False
    silent: bool = False


@dataclass
class Fault:
    """Answers to requests whose "METHOD /path" matches: a status, `CUT`, or `LOSE`: done, but the answer is cut."""

    pattern: str
    status: int | Answer
    times: float


class Hub(ThreadingHTTPServer):
    """The server and its memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        # Held by a request for a large file, so that a test can delay an upload.
        self.uploads_pass = threading.Event()
        self.uploads_pass.set()
        self.stopped = threading.Event()

    def fail(self, pattern: str, status: int | Answer, times: float = 1) -> None:
        self.faults.append(Fault(pattern, status, times))

    def commits(self, repo: str, branch: str = "main") -> list[Commit]:
        return self.repositories[repo].branches[branch][1:]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


@contextmanager
def serve():
    """Run a hub in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    loses_answer = False

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> Any:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                if isinstance(fault.status, Answer):
                    return self._send_strange(fault.status)
                self.loses_answer = fault.status == LOSE
                if fault.status == LOSE:
                    break
                if fault.status == CUT:
                    self.close_connection = True
                    return None
                return self._send(fault.status, {"error": "made to fail"})
        for pattern, name in ROUTES:
            match = re.fullmatch(pattern, request)
            if match and self._may(**match.groupdict()):
                return getattr(self, name)(**match.groupdict())
            if match:
                return None
        self._send(404, {"error": f"no route for {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.loses_answer:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_strange(self, answer: Answer) -> None:
        self.close_connection = True
        if answer.silent:
            self.server.stopped.wait(20)
            return
        self.send_response(answer.status)
        sized = {} if answer.endless else {"Content-Length": str(len(answer.body))}
        for name, value in {"Connection": "close", **sized, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        end = _clock() + 20
        while _clock() < end and not self.server.stopped.is_set():
            for piece in [answer.body[i : i + 1] for i in range(len(answer.body))] if answer.pause else [answer.body]:
                if answer.pause:
                    self.server.stopped.wait(answer.pause)
                self.wfile.write(piece)
            if not answer.endless:
                return

    def _may(self, repo: str | None = None, **_: Any) -> bool:
        """Answer 401, 403 or 404 if the token does not allow the request."""
        if "/lfs/" in self.path or self.path.endswith(("/api/validate-yaml", "/verify")):
            return True
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user, writes = TOKENS.get(token, (None, False))
        if (token and user is None) or (user is None and self.command == "POST"):
            self._send(401, {"error": "Invalid username or password."})
            return False
        if self.command == "POST" and not writes:
            self._send(403, {"error": "the token may only read"}, {"X-Error-Message": "You need write access."})
            return False
        if repo is not None:
            found = self.server.repositories.get(repo)
            if found is None or (found.private and user is None):
                self._send(404 if user else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
                return False
        return True

    def whoami(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self._send(200, {"name": TOKENS[token][0], "type": "user", "orgs": []})

    def create(self) -> Any:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'ada'}/{wanted['name']}"
        if not repo.startswith("ada/"):
            return self._send(403, {"error": "no rights in this namespace"})
        exists = repo in self.server.repositories
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories.setdefault(repo, Repository(private))
        self._send(409 if exists else 200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def branch(self, repo: str, revision: str) -> Any:
        branches = self.server.repositories[repo].branches
        exists = revision in branches
        branches.setdefault(revision, [branches["main"][-1]])
        self._send(409 if exists else 200, {})

    def validate(self) -> None:
        problems = card_problems(json.loads(self.body)["content"])
        self._send(400 if problems else 200, {"errors": [{"message": p} for p in problems], "warnings": []})

    def preupload(self, repo: str, revision: str) -> Any:
        commit = self.server.repositories[repo].find(revision)
        if commit is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = [
            {
                "path": wanted["path"],
                "uploadMode": "lfs" if wanted["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(wanted["path"], commit.files.get(wanted["path"])),
            }
            for wanted in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": files})

    @staticmethod
    def _oid(path: str, content: bytes | None) -> str | None:
        """What identifies a file that is there: sha256 of a large one, git's hash of another."""
        if content is None:
            return None
        if path.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid = wanted["oid"]
            links = {name: {"href": f"{self.server.url}/lfs/{oid}{end}"} for name, end in UPLOAD_LINKS.items()}
            objects.append({**wanted, **({} if oid in self.server.large else {"actions": links})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> Any:
        self.server.uploads_pass.wait(30)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "checksum"})
        self.server.large[oid] = self.body
        self._send(200)

    def verify(self, oid: str) -> None:
        self._send(200 if oid in self.server.large else 404, {})

    def commit(self, repo: str, revision: str) -> Any:
        commits = self.server.repositories[repo].branches.get(revision)
        if commits is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        message, files = "", dict(commits[-1].files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        if "README.md" in files and card_problems(files["README.md"].decode()):
            return self._send(400, {"error": "invalid metadata"})
        commits.append(Commit(message, files))
        url = f"{self.server.url}/{repo}/commit/{commits[-1].oid}"
        self._send(200, {"commitUrl": url, "commitOid": commits[-1].oid, "pullRequestUrl": None, "success": True})

    def info(self, repo: str, revision: str = "main") -> Any:
        found = self.server.repositories[repo]
        commit = found.find(revision)
        if commit is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in commit.files]
        self._send(200, {"id": repo, "sha": commit.oid, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        commit = self.server.repositories[repo].find(revision)
        files = {} if commit is None else commit.files
        entries = [{"type": "file", "path": p, "size": len(c), "oid": self._oid(p, c)} for p, c in files.items()]
        self._send(200, entries)

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        commit = self.server.repositories[repo].find(revision)
        if commit is None:
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        if path not in commit.files:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        content = commit.files[path]
        headers = {"ETag": f'"{self._oid(path, content)}"', "X-Repo-Commit": commit.oid}
        self._send(200, content, headers)


UPLOAD_LINKS = {"upload": "", "verify": "/verify"}
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{_REPO}/branch/(?P<revision>.+)", "branch"),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    (rf"POST /{_REPO}.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(?P<oid>\w+)", "upload"),
    (r"POST /lfs/(?P<oid>\w+)/verify", "verify"),
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+).*", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
