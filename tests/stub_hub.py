"""A small Hugging Face Hub on the loopback, for the real client to push models and data sets to and to load them from.

It proves that the protocol is used well and that what was pushed comes back. It does not prove what the Hub itself
makes of our cards, nor anything about Xet: clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

MAX_REGULAR_BYTES = 10 * 2**20
# A data set's name begins with "datasets/", as in the address of its page.
NAME, REVISION = r"(?P<name>(?:datasets/)?[\w-][\w.-]*/[\w-][\w.-]*)", r"(?P<revision>[^/?]+)"
API = f"/api/(?:models/)?{NAME}"
MODEL_ID = r"([\w-][\w.-]*/)?[\w-][\w.-]*"  # the oldest models have no owner
# Method, path with query, method of StubHub. A query that is not spelled out here makes the route an unknown one.
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("GET", "/api/agent-harnesses", "not_here"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"{API}/preupload/main", "preupload"),
    ("POST", f"{API}/commit/main", "commit"),
    ("GET", rf"{API}(?:/revision/{REVISION})?(?:\?expand=.*)?", "info"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>[^?]+))?\?(?P<query>.*)", "tree"),
    ("POST", f"{API}/paths-info/{REVISION}", "paths_info"),
    ("GET", "/api/(?:models|datasets)/.*/xet-(?:read|write)-token/.*", "xet"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("GET HEAD", f"/{NAME}/resolve/{REVISION}/(?P<path>[^?]+)", "resolve"),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", "store"),
    ("GET HEAD", "/storage/(?P<oid>[0-9a-f]{64})", "fetch"),
)


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    token: str | None
    body: bytes


@dataclass
class Reply:
    """What it gets back."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error that the real Hub returns too."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(message)
        self.reply = as_json({"error": message} | more, status)
        self.reply.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Fault:
    """What happens to each request whose method and path begin so: it gets a status, or its connection is cut (0)."""

    request: str  # such as "POST /api/repos/create"
    status: int = 0


class Repo:
    """The commits of a repository, oldest first: each holds every file."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.head = ""
        lfs = b"filter=lfs diff=lfs merge=lfs -text"
        self.add({".gitattributes": b"*.safetensors %b\n*.parquet %b\n" % (lfs, lfs)})

    def add(self, changes: dict[str, bytes]) -> None:
        """Commit the files of `changes` on top of the head."""
        files = self.commits.get(self.head, {}) | changes
        listing = [self.head, *(path + blob_id(data) for path, data in sorted(files.items()))]
        self.head = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[self.head] = files


class StubHub(ThreadingHTTPServer):
    """A Hub with one user, `me`, whose token is `hf_stub`.

    `with StubHub() as hub:` serves at `hub.url`. `repos`, `objects` (large files by SHA-256) and `requests` show what
    arrived; `faults` are those that it has just now; `unexpected` lists what this stub does not know or could not do,
    and a test asserts that it stayed empty.
    """

    token = "hf_stub"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # The client follows a redirect to the same host name by itself, and then misses the headers of `resolve`.
        self.storage_url = f"http://localhost:{self.server_port}/storage"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.unexpected: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "StubHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, name: str) -> dict[str, bytes]:
        """The files at the head of a repository."""
        return self.repos[name].commits[self.repos[name].head]

    def answer(self, request: Request) -> Reply:
        """Return the reply to `request`; what must fail a test is recorded."""
        with self.lock:  # a client uploads from several threads
            self.requests.append(request)
            fault = self.fault_of(f"{request.method} {request.path}")
            if fault is not None:
                return as_json({"error": "a fault of the stub"}, fault.status)
            try:
                for methods, pattern, handler in ROUTES:
                    match = re.fullmatch(pattern, request.path)
                    if match and request.method in methods.split():
                        return getattr(self, handler)(request, **match.groupdict())
                raise NotImplementedError("unknown route")
            except Refusal as refusal:
                return refusal.reply
            except Exception:
                self.unexpected.append(f"{request.method} {request.path}: {traceback.format_exc()}")
                return Reply(self.unexpected[-1].encode(), 500)

    def fault_of(self, request: str) -> Fault | None:
        """The fault that `request` meets, if any."""
        return next((fault for fault in self.faults if request.startswith(fault.request)), None)

    def authorize(self, request: Request) -> None:
        if request.token != self.token:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def readable(self, request: Request, name: str, revision: str | None = None) -> tuple[str, dict[str, bytes]]:
        """Return the commit that `revision` means, and its files, to those who may know of them."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and request.token != self.token):
            raise Refusal(404 if request.token == self.token else 401, "Repository not found", "RepoNotFound")
        commit = repo.head if revision in (None, "main") else str(revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def writable(self, request: Request, name: str) -> Repo:
        self.authorize(request)
        self.readable(request, name)
        return self.repos[name]

    def whoami(self, request: Request) -> Reply:
        self.authorize(request)
        return as_json({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})

    def not_here(self, request: Request) -> Reply:
        raise Refusal(404, "Not found")

    def xet(self, request: Request) -> Reply:
        self.unexpected.append("a Xet token was asked for: set HF_HUB_DISABLE_XET=1")
        raise Refusal(400, self.unexpected[-1])  # the Xet client repeats for minutes what gets a 500

    def create(self, request: Request) -> Reply:
        self.authorize(request)
        wish = json.loads(request.body)
        if wish.get("type", "model") not in ("model", "dataset"):
            raise NotImplementedError("models and data sets only")
        if wish["organization"] != "me":
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        name = f"datasets/me/{wish['name']}" if wish.get("type") == "dataset" else f"me/{wish['name']}"
        if name in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{name}")
        # Clients before 2.0 send `private`.
        self.repos[name] = Repo(private=wish.get("visibility") == "private" or wish.get("private", False))
        return as_json({"url": f"{self.url}/{name}"})

    def validate(self, request: Request) -> Reply:
        errors = [{"message": message} for message in card_errors(json.loads(request.body)["content"])]
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, request: Request, name: str) -> Reply:
        self.writable(request, name)
        files = []
        for file in json.loads(request.body)["files"]:
            path, before = file["path"], self.files(name).get(file["path"])
            mode = "lfs" if is_large(path, file["size"]) else "regular"
            # With the id of what is here already, the client leaves out what has not changed.
            oid = None if before is None else sha256(before) if is_large(path, len(before)) else blob_id(before)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    def batch(self, request: Request, name: str) -> Reply:
        self.writable(request, name)
        wish = json.loads(request.body)
        if wish["operation"] != "upload" or "basic" not in wish["transfers"]:
            raise NotImplementedError("basic uploads only")
        for item in wish["objects"]:
            if item["oid"] not in self.objects:
                item["actions"] = {"upload": {"href": f"{self.storage_url}/{item['oid']}"}}
        return as_json({"transfer": "basic", "objects": wish["objects"]})

    def store(self, request: Request, oid: str) -> Reply:
        if sha256(request.body) != oid:
            raise Refusal(400, "The content does not have the announced SHA-256")
        self.objects[oid] = request.body
        return Reply()

    def fetch(self, request: Request, oid: str) -> Reply:
        return Reply(self.objects[oid])

    def commit(self, request: Request, name: str) -> Reply:
        repo = self.writable(request, name)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", repo.head) != repo.head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = {operation["value"]["path"]: self.content(operation) for operation in operations}
        errors = card_errors(changes.get("README.md", b"").decode())
        if errors:
            raise Refusal(400, "; ".join(errors))
        repo.add(changes)
        return as_json({"commitUrl": f"{self.url}/{name}/commit/{repo.head}", "commitOid": repo.head})

    def content(self, operation: dict[str, Any]) -> bytes:
        """The bytes of a file that a commit brings, or refers to."""
        value = operation["value"]
        if operation["key"] == "lfsFile":
            data = self.objects.get(value["oid"])
            if value["algo"] != "sha256" or data is None or len(data) != value["size"]:
                raise Refusal(400, f"{value['path']}: the large file was not uploaded")
            return data
        if operation["key"] != "file" or value["encoding"] != "base64":
            raise NotImplementedError(f"operation {operation['key']}")
        data = base64.b64decode(value["content"], validate=True)
        if is_large(value["path"], len(data)):
            raise Refusal(400, f"{value['path']} must be uploaded as a large file")
        return data

    def info(self, request: Request, name: str, revision: str | None) -> Reply:
        commit, files = self.readable(request, name, revision)
        card = front_matter(files.get("README.md", b"").decode())
        kind = card.get("base_model_relation")
        tags = [*card.get("tags", []), *(f"base_model:{kind}:{model}" for model in base_models(card) if kind)]
        siblings = [{"rfilename": path} for path in files]
        repo_id = name.removeprefix("datasets/")
        about = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": self.repos[name].private}
        return as_json(about | {"tags": tags, "cardData": card, "siblings": siblings})

    def tree(self, request: Request, name: str, revision: str, folder: str | None, query: str) -> Reply:
        files = self.readable(request, name, unquote(revision))[1]
        start = f"{unquote(folder)}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(start)}
        if start and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        if "recursive=true" in query.lower():
            return as_json([tree_entry(*file) for file in inside.items()])
        folders = {path[: path.index("/", len(start))] for path in inside if "/" in path[len(start) :]}
        here = [tree_entry(*file) for file in inside.items() if "/" not in file[0][len(start) :]]
        return as_json([*here, *({"type": "directory", "path": path, "oid": ""} for path in sorted(folders))])

    def paths_info(self, request: Request, name: str, revision: str) -> Reply:
        files = self.readable(request, name, unquote(revision))[1]
        wanted = parse_qs(request.body.decode()).get("paths", [])
        if request.body.startswith(b"{"):
            wanted = json.loads(request.body)["paths"]
        found = [tree_entry(path, files[path]) for path in wanted if path in files]
        folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in files)]
        return as_json([*found, *({"type": "directory", "path": path, "oid": ""} for path in folders)])

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Reply:
        commit, files = self.readable(request, name, revision)
        path = unquote(path)
        if path not in files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.reply.headers["X-Repo-Commit"] = commit
            raise refusal
        entry = tree_entry(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            return Reply(files[path], headers=headers)
        oid = entry["lfs"]["oid"]
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[path]))}
        return Reply(status=302, headers=headers | {"Location": f"{self.storage_url}/{oid}"})


class Handler(BaseHTTPRequestHandler):
    """Reads a request and writes the reply of the server, a `StubHub`."""

    server: StubHub

    def reply(self) -> None:
        fault = self.server.fault_of(f"{self.command} {self.path}")
        if fault is not None and fault.status == 0:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.answer(Request(self.command, self.path, bearer or None, body))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and reply.status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(reply.body)), len(reply.body) - 1)
            span = {"Content-Range": f"bytes {first}-{last}/{len(reply.body)}"}
            reply = Reply(reply.body[first : last + 1], 206, reply.headers | span)
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = reply

    def log_message(self, *_: object) -> None:
        pass


def as_json(value: object, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def blob_id(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_large(path: str, size: int) -> bool:
    """Whether a file is kept in large file storage; the client never sends empty files there."""
    return size > MAX_REGULAR_BYTES or (size > 0 and path.endswith((".safetensors", ".parquet")))


def tree_entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing; for git, a large one is the pointer file that stands for it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if is_large(path, len(data)):
        oid = sha256(data)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry["oid"] = blob_id(pointer)
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
    return entry


def front_matter(card: str) -> Any:
    match = re.match(r"---\n(.*?)^---\n", card, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) or {} if match else {}


def base_models(matter: dict[str, Any]) -> list[Any]:
    models = matter.get("base_model", [])
    return models if isinstance(models, list) else [models]


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a card's front matter."""
    try:
        matter = front_matter(card)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if not isinstance(matter, dict):
        return ["the front matter is not a mapping"]
    errors = [
        f"base_model: {m!r} is not a model id" for m in base_models(matter) if not re.fullmatch(MODEL_ID, str(m))
    ]
    if matter.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append("base_model_relation must be adapter, merge, quantized or finetune")
    index = matter.get("model-index", [])
    if not isinstance(index, list) or not all(isinstance(entry, dict) and "results" in entry for entry in index):
        errors.append("model-index must be a list of models with results")
    return errors
