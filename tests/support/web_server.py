"""A web server on this machine that can be slow, cut connections, refuse, forget to
answer, and lie, and that notes every request."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import unquote

PIECE = 1 << 13  # bytes that are sent at once


class Request(NamedTuple):
    """A request: its method, path with the query, first byte, and headers."""

    method: str
    path: str
    start: int
    headers: dict[str, str]


class Local:
    """Serves on 127.0.0.1. handler: answers requests, and has this server as
    ``own``."""

    handler: type[QuietHandler]
    certificate: Path | None = None
    port: int = 0

    def start(self) -> Self:
        """Begin to serve, on the same port as before."""
        handler = type("Own", (self.handler,), {"own": self})
        self.server = QuietServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.going = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop serving, and break what is being sent."""
        self.going = False
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        """Return the address of the server."""
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self.port}"


@dataclass
class WebServer(Local):
    """Serves files on 127.0.0.1.

    files: contents by path, /data/x.tar. tags: "md5", "other" (a tag that is no
    digest), "weak", "date" (no tag, a date), "none". ranges: answer requests for parts.
    heed: obey If-Match. speed: bytes a second of each answer. cuts: bytes of a body
    after which the next connections are cut, one entry for each. statuses: what the
    next answers are in place of files, one entry for each. always: of all answers.
    spoil: changes the bytes of an answer: (path, bytes, first byte) → bytes. password:
    "user:password" that requests must bring. answered: requests. sent: bytes of bodies
    that were sent, by path.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    tags: str = "md5"
    ranges: bool = True
    heed: bool = True
    speed: float = 0.0
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    always: int = 0
    spoil: Callable[[str, bytes, int], bytes] | None = None
    password: str = ""
    modified: float = 1_700_000_000.0
    answered: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    certificate: Path | None = None
    port: int = 0

    @property
    def handler(self) -> type[QuietHandler]:
        return _Handler

    def gets(self, path: str = "") -> list[Request]:
        """Return the requests for bodies, of one file or of all."""
        return [r for r in self.answered if r.method == "GET" and r.path.startswith(path)]

    def tag(self, path: str) -> str:
        """Return a file's tag."""
        digest = hashlib.md5(self.files[path]).hexdigest()
        return {"md5": digest, "other": f"w-{digest[:9]}", "weak": digest[:9]}.get(self.tags, "")


class QuietServer(ThreadingHTTPServer):
    """Serves many clients, of which some leave in the midst of an answer."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, *about: object) -> None:
        """Say nothing: clients leave, and are meant to."""


class QuietHandler(BaseHTTPRequestHandler):
    """Answers requests without a word on stderr."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *about: object) -> None:
        """Say nothing."""


class _Handler(QuietHandler):
    own: WebServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        own, place = self.own, unquote(self.path.partition("?")[0])
        if not own.going:
            self.close_connection = True
            return
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        begin, _, end = asked.partition("-")
        start = int(begin or 0) if own.ranges else 0
        own.answered.append(Request(self.command, self.path, start, dict(self.headers)))
        status = own.always or (own.statuses.pop(0) if own.statuses else 0)
        if own.password and not status:
            from base64 import b64encode

            token = b64encode(own.password.encode()).decode()
            status = 0 if self.headers.get("Authorization") == f"Basic {token}" else 401
        if not status and place not in own.files:
            status = 404
        match = self.headers.get("If-Match", "").strip('"')
        fresh = match == own.tag(place) and own.tags != "weak" if match else True
        if not status and own.heed and not fresh:
            status = 412
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = own.files[place]
        stop = min(int(end) + 1 if end else len(whole), len(whole))
        body = whole[start:stop] if asked and own.ranges else whole
        self.send_response(206 if asked and own.ranges else 200)
        if asked and own.ranges:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(body)))
        if tag := own.tag(place):
            self.send_header("ETag", f'{"W/" * (own.tags == "weak")}"{tag}"')
        if own.tags != "none":
            self.send_header("Last-Modified", formatdate(own.modified, usegmt=True))
        self.end_headers()
        if self.command == "GET":
            self._send(place, own.spoil(place, body, start) if own.spoil else body)

    def _send(self, place: str, body: bytes) -> None:
        own = self.own
        cut = own.cuts.pop(0) if own.cuts and len(body) > 1 else len(body)
        for at in range(0, min(cut, len(body)), PIECE):
            piece = body[at : min(at + PIECE, cut)]
            self.wfile.write(piece)
            own.sent[place] = own.sent.get(place, 0) + len(piece)
            if own.speed:
                time.sleep(len(piece) / own.speed)
            if not own.going:
                cut = 0
                break
        if cut < len(body):
            self.wfile.flush()
            self.close_connection = True


def make_certificate(folder: Path) -> Path:
    """Make a key and a certificate of 127.0.0.1 in one file, signed by itself."""
    path = folder / "server.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    path.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return path
