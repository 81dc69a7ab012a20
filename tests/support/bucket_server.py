"""A bucket on this machine, served by SeaweedFS as S3."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY, SECRET = "a-key", "a-secret-that-nobody-prints"
BUCKET = "pictures"
STARTS = 60.0  # seconds within which the server must answer


def weed() -> Path | None:
    """Return SeaweedFS's program: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


def free_ports(n: int) -> list[int]:
    """Return ports that nobody uses. SeaweedFS adds 10,000 to each for itself."""
    found: list[int] = []
    while len(found) < n:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1] % 20_000 + 20_000
            try:
                other.bind(("127.0.0.1", port + 10_000))
                with socket.socket() as third:
                    third.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Bucket:
    """A bucket. url: of it. variables: that let obstore read it."""

    def __init__(self, port: int) -> None:
        self.url = f"s3://{BUCKET}"
        self.variables = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
        }
        self.port = port

    @property
    def store(self) -> Any:
        """Return obstore's connection, for writing."""
        from obstore.store import S3Store

        return S3Store(
            BUCKET,
            access_key_id=KEY,
            secret_access_key=SECRET,
            endpoint=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def put(self, folder: Path, place: str) -> str:
        """Copy the files of a folder into the bucket. Returns the URL."""
        import obstore

        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = f"{place}/{file.relative_to(folder)}"
                obstore.put(self.store, name, file.read_bytes())
        return f"{self.url}/{place}"


@contextmanager
def serving(folder: Path) -> Iterator[Bucket]:
    """Start a server whose files lie in a folder, and end it at the end."""
    master, volume, filer, s3 = free_ports(4)
    (folder / "data").mkdir(parents=True)
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        *(weed(), "server", "-dir", folder / "data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-s3"),
        *(f"-s3.port={s3}", "-s3.config", folder / "s3.json", "-volume.max=100"),
        *("-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, stdout=log, stderr=log, env=dict(os.environ)
        )
    try:
        _await(s3, process, folder / "log")
        _make_bucket(master)
        yield Bucket(s3)
    finally:
        process.kill()
        process.wait()


def _await(port: int, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + STARTS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS didn't start: {log.read_text()[-2000:]}")


def _make_bucket(master: int) -> None:
    until = time.monotonic() + STARTS
    while time.monotonic() < until:
        said = subprocess.run(
            [str(weed()), "shell", "-master", f"127.0.0.1:{master}"],
            input=f"s3.bucket.create -name {BUCKET}\n",
            capture_output=True,
            text=True,
        )
        if "created bucket" in said.stdout + said.stderr:
            return
        time.sleep(0.2)
    raise RuntimeError(f"SeaweedFS made no bucket: {said.stdout}{said.stderr}")
