"""A hub on this machine: the requests of Hugging Face's that huggingface_hub makes to
create repositories, to upload (LFS, without Xet) and to download, with the limits that
the hub's pages name. It can be slow, cut connections, refuse, and lie, and it notes
every request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import yaml

from cache.hub import client
from support.web_server import Local, QuietHandler

PIECE = 1 << 14  # bytes that are sent at once
FILES, ENTRIES, FILES_OF_A_COMMIT, LARGEST = 100_000, 10_000, 100, 20_000_000_000
REPO = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"


class Refusal(Exception):
    """An answer that isn't 200: status, the hub's code and message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


@dataclass
class Repo:
    """A repository. commits: files by path, by commit: (sha256 or "", bytes)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, tuple[str, bytes]]) -> str:
        told = f"{len(self.commits)}" + "".join(f"{n}{s}{len(b)}" for n, (s, b) in files.items())
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid] = files
        self.refs["main"] = oid
        return oid


@dataclass
class Hub(Local):
    """Serves repositories on 127.0.0.1.

    tokens: name of the user, organisations and role, by token. next: answers in place
    of the next requests whose "METHOD path" matches: (pattern, status, headers).
    forgotten: patterns of the next requests that are obeyed and not answered. cuts:
    bytes of a download after which the next connections are cut. speed: bytes a second
    of a download. spoil: changes the bytes of a download: (path, bytes) → bytes. page:
    entries of a page of a list. seen: "METHOD path" of all requests.
    """

    tokens: dict[str, tuple[str, tuple[str, ...], str]] = field(
        default_factory=lambda: {"hf_writer": ("ann", ("lab",), "write")}
    )
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by sha256
    next: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    speed: float = 0.0
    spoil: Callable[[str, bytes], bytes] | None = None
    page: int = 50
    seen: list[str] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)  # files of each commit
    starts: list[tuple[str, int]] = field(default_factory=list)  # of downloads: file, first byte

    @property
    def handler(self) -> type[QuietHandler]:
        return _Handler

    @property
    def variables(self) -> dict[str, str]:
        """Return what huggingface_hub needs in the environment of a process."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}

    def count(self, pattern: str) -> int:
        """Count the requests that match."""
        return sum(re.search(pattern, one) is not None for one in self.seen)

    def files(self, repo: str, kind: str = "datasets") -> dict[str, bytes]:
        """Return the files of a repository's newest commit."""
        held = self.repos[kind, repo]
        files = held.commits[held.refs["main"]]
        return {name: self.objects[sha] if sha else body for name, (sha, body) in files.items()}

    def put(self, repo: str, name: str, body: bytes | None, kind: str = "datasets") -> str:
        """Write a file into a repository, or take it away, as a commit of its own."""
        held = self.repos.setdefault((kind, repo), Repo())
        files = dict(held.commits[held.refs["main"]]) if held.refs else {}
        files.pop(name, None)
        if body is not None and name.endswith(".tar"):
            sha = hashlib.sha256(body).hexdigest()
            self.objects[sha] = body
            files[name] = (sha, body)
        elif body is not None:
            files[name] = ("", body)
        return held.commit(files)


class _Handler(QuietHandler):
    own: Hub

    def _any(self) -> None:
        if not self.own.going:
            self.close_connection = True
            return None
        place, _, self.query = self.path.partition("?")
        self.place = unquote(place)
        self.body = self._read()
        self.asked = f"{self.command} {self.place}"
        self.own.seen.append(self.asked)
        try:
            for number, (pattern, status, headers) in enumerate(self.own.next):
                if re.search(pattern, self.asked):
                    del self.own.next[number]
                    return self._answer(status, b"{}", headers)
            for pattern, call in ROUTES.items():
                if found := re.fullmatch(pattern, self.asked):
                    return call(self, **found.groupdict())
            raise Refusal(404, "", f"no such page: {self.place}")
        except Refusal as no:
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
            said = json.dumps({"error": no.message}).encode()
            self._answer(no.status, said, {k: v for k, v in headers.items() if v})
        return None

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        for pattern in self.own.forgotten:
            if re.search(pattern, self.asked):
                self.own.forgotten.remove(pattern)
                self.close_connection = True
                return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(document).encode(), headers)

    def _user(self) -> tuple[str, tuple[str, ...], str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.own.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.own.tokens.get(token)

    def _may_write(self, namespace: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if user[2] != "write" or namespace not in (user[0], *user[1]):
            raise Refusal(403, "", f"You don't have the rights to write to {namespace}")

    def _repo(self, kind: str, repo: str) -> Repo:
        found, user = self.own.repos.get((kind, repo)), self._user()
        mine = user is not None and repo.partition("/")[0] in (user[0], *user[1])
        if found is None or (found.private and not mine):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if found.gated and not mine:
            raise Refusal(403, "GatedRepo", "Access to it is restricted")
        return found

    def _files(self, held: Repo, revision: str) -> tuple[str, dict[str, tuple[str, bytes]]]:
        oid = held.refs.get(revision, revision)
        if oid not in held.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, held.commits[oid]

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        name, orgs, role = user
        self._json(
            {
                "type": "user",
                "name": name,
                "orgs": [{"name": one} for one in orgs],
                "auth": {"type": "access_token", "accessToken": {"role": role}},
            }
        )

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self._user()
        namespace = asked.get("organization") or (user[0] if user else "")
        self._may_write(namespace)
        kind, repo = f"{asked.get('type', 'model')}s", f"{namespace}/{asked['name']}"
        prefix = "datasets/" if kind == "datasets" else ""
        made = {"url": f"{self.own.url}/{prefix}{repo}", "name": repo}
        if (kind, repo) in self.own.repos:
            return self._answer(409, json.dumps(made | {"error": "it is there"}).encode())
        held = Repo(private=asked.get("visibility") == "private")
        held.commit({".gitattributes": ("", b"*.tar filter=lfs\n")})
        self.own.repos[kind, repo] = held
        return self._json(made)

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        held = self._repo(kind, repo)
        oid, files = self._files(held, revision)
        self._json(
            {
                "id": repo,
                "_id": "0",
                "sha": oid,
                "private": held.private,
                "gated": held.gated,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def tree(self, kind: str, repo: str, revision: str) -> None:
        _, files = self._files(self._repo(kind, repo), revision)
        entries = []
        for name, (sha, body) in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body)}
            entry["oid"] = _blob(body)
            if sha:
                entry["lfs"] = {"oid": sha, "size": len(body), "pointerSize": 130}
            entries.append(entry)
        first = int(parse_qs(self.query).get("cursor", ["0"])[0])
        headers = {}
        if first + self.own.page < len(entries):
            more = f"{self.own.url}{self.path.partition('?')[0]}?cursor={first + self.own.page}"
            headers["Link"] = f'<{more}&recursive=True>; rel="next"'
        self._json(entries[first : first + self.own.page], headers)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---", content, re.S)
        try:
            good = isinstance(yaml.safe_load(head[1]) if head else {}, dict)
        except yaml.YAMLError:
            good = False
        if not good:
            said = json.dumps({"errors": [{"message": "no YAML"}], "warnings": []})
            return self._answer(400, said.encode())
        return self._json({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        held = self._repo(kind, repo)
        self._may_write(repo.partition("/")[0])
        _, files = self._files(held, revision)
        answers = []
        for one in json.loads(self.body)["files"]:
            if one["size"] > LARGEST:
                raise Refusal(413, "", "the file is too large")
            large = one["path"].endswith((".tar", ".safetensors", ".onnx")) or one["size"] > 10**7
            sha, body = files.get(one["path"], ("", b""))
            oid = (sha or _blob(body)) if one["path"] in files else None
            answers.append(
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self._json({"files": answers})

    def batch(self, repo: str, prefix: str) -> None:
        self._repo(prefix or "models", repo)
        self._may_write(repo.partition("/")[0])
        answers = []
        for one in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.own.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.own.url}/lfs/{one['oid']}", "header": {}},
                    "verify": {"href": f"{self.own.url}/verify", "header": {}},
                }
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the bytes have another digest")
        self.own.objects[oid] = self.body
        self._answer(200, b"")

    def verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.own.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "", "the object is not there")
        self._json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        held = self._repo(kind, repo)
        self._may_write(repo.partition("/")[0])
        _, before = self._files(held, revision)
        files, changed = dict(before), 0
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            changed += item["key"] != "header"
            if item["key"] == "file":
                files[value["path"]] = ("", base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.own.objects:
                    raise Refusal(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = (value["oid"], self.own.objects[value["oid"]])
            elif item["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                del files[value["path"]]
        require_limits(changed, list(files))
        self.own.commits.append(changed)
        oid = held.commit(files)
        self._json({"commitUrl": f"{self.own.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo: str, revision: str, file: str, prefix: str) -> None:
        oid, files = self._files(self._repo(prefix or "models", repo), revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        sha, body = files[file]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{sha or _blob(body)}"'}
        if not sha:
            return self._send(file, body, headers)
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(body))}
        # Another host, as the hub's: the library doesn't follow to it in a HEAD.
        headers["Location"] = f"http://localhost:{self.own.port}/cdn/{sha}/{file}"
        return self._answer(302, b"", headers)

    def cdn(self, oid: str, file: str) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "", "a token was sent to another host")
        self._send(file, self.own.objects[oid], {"ETag": f'"{oid}"'})

    def _send(self, file: str, body: bytes, headers: dict[str, str]) -> None:
        own = self.own
        body = own.spoil(file, body) if own.spoil else body
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = int(asked[2]) + 1 if asked and asked[2] else len(body)
        if self.command == "GET":
            own.starts.append((file, start))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        for name, value in headers.items():
            self.send_header(name, value)
        part = body[start:stop]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = own.cuts.pop(0) if own.cuts and file.endswith(".tar") else len(part)
        for at in range(0, min(cut, len(part)), PIECE):
            piece = part[at : min(at + PIECE, cut)]
            self.wfile.write(piece)
            if own.speed:
                time.sleep(len(piece) / own.speed)
        if cut < len(part):
            self.wfile.flush()
            self.close_connection = True


def require_limits(changed: int, files: list[str]) -> None:
    """Raise Refusal for a commit beyond the hub's limits. changed: files of the
    commit. files: of the repository."""
    entries: Counter[str] = Counter()
    for name in {"/".join(n.split("/")[:i]) for n in files for i in range(1, n.count("/") + 2)}:
        entries[name.rpartition("/")[0]] += 1
    most = max(entries.values(), default=0)
    if changed > FILES_OF_A_COMMIT or len(files) > FILES or most > ENTRIES:
        raise Refusal(413, "", f"too many files: {changed}, {len(files)}, {most}")


def _blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


_HOSTED = r"(?P<prefix>datasets(?=/))?/?(?P<repo>[^/]+/[^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    r"GET /api/whoami-v2": _Handler.whoami,
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate_yaml,
    rf"GET /api/{REPO}": _Handler.info,
    rf"GET /api/{REPO}/revision/(?P<revision>.+)": _Handler.info,
    rf"GET /api/{REPO}/tree/(?P<revision>[^/]+)/?": _Handler.tree,
    rf"POST /api/{REPO}/preupload/(?P<revision>.+)": _Handler.preupload,
    rf"POST /api/{REPO}/commit/(?P<revision>.+)": _Handler.commit,
    rf"POST /{_HOSTED}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": _Handler.upload,
    r"POST /verify": _Handler.verify,
    r"(?:GET|HEAD) /cdn/(?P<oid>[0-9a-f]{64})/(?P<file>.+)": _Handler.cdn,
    rf"(?:GET|HEAD) /{_HOSTED}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": _Handler.resolve,
}


@contextmanager
def a_hub(folder: Path) -> Iterator[Hub]:
    """Serve an empty hub to this process and to those that it starts, with a cache
    folder of its own."""
    from huggingface_hub import constants

    hub = Hub().start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.variables.items():
            patch.setenv(name, value)
        patch.setenv("OFFLINE_MEAL_CACHE", str(folder / "hub-cache"))
        patch.setenv("HF_HOME", str(folder / "hf-home"))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        # read when the library is imported
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(client, "PATIENCE", 3.0)
        patch.setattr(client, "FIRST", 0.05)
        patch.setattr(client, "tell", lambda line: None)
        yield hub
    hub.stop()
