"""Read what Weights & Biases keeps of an offline run, and stand in for its server and
for a server that hangs."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK, HEAD, START = 32768, 7, 7  # of LevelDB's log format, in which the file is written


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, parts = file.read_bytes(), START, b""
    assert raw[:4] == b":W&B"
    while place + HEAD <= len(raw):
        left = BLOCK - place % BLOCK
        if left < HEAD:
            place += left
            continue
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        if not kind:  # what a kill left of a block
            return
        parts += raw[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def offline_run(out: Path) -> tuple[dict, dict, dict, int | None]:
    """Return the history (tag → [(step, figure)]), the config, the summary and the exit
    code of the one offline run in a run's folder."""
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    history: dict[str, list] = {}
    config, summary, code = {}, {}, None
    for record in records(file):
        for item in (*record.run.config.update, *record.config.update):
            config["".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.summary.update:
            summary["".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if record.HasField("exit"):
            code = record.exit.exit_code
        if record.HasField("history"):
            row = {
                "/".join(i.nested_key) or i.key: json.loads(i.value_json)
                for i in record.history.item
            }
            for tag, value in row.items():
                if not tag.startswith("_"):
                    history.setdefault(tag, []).append((record.history.step.num, value))
    return history, config, summary, code


@contextmanager
def hanging_server() -> Iterator[str]:
    """Take connections on 127.0.0.1, and never answer. Yields the address."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()


class FakeWandb(ThreadingHTTPServer):
    """Answers what the library of Weights & Biases asks of its server for one run.

    history: the rows of the run, at the offsets that the library gave. codes: the exit
    codes of the processes that ended the run. silent: answer nothing any more.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.history: list[str] = []
        self.codes: list[int] = []
        self.silent = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def points(self, tag: str) -> list[tuple[int, float]]:
        rows = map(json.loads, self.history)
        return [(row["_step"], row[tag]) for row in rows if tag in row]

    def told(self, question: str, variables: dict) -> dict:
        """Answer a question in GraphQL."""
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
        run = {
            **{"id": "R", "name": "run", "displayName": "run", "project": project},
            **{"historyLineCount": len(self.history), "logLineCount": 0, "eventsLineCount": 0},
        }
        if "UpsertBucket" in question:
            return {"upsertBucket": {"bucket": run, "inserted": not self.history}}
        if "RunResumeStatus" in question:
            known = {
                **run,
                **{"historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]"},
                **{"summaryMetrics": "{}", "config": "{}", "tags": []},
                "wandbConfig": json.dumps({"t": 1}),
            }
            return {"model": {**project, "bucket": known if self.history else None}}
        if "CreateRunFiles" in question:
            files = [{"name": f, "uploadUrl": f"{self.url}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {}


class _Answers(BaseHTTPRequestHandler):
    server: FakeWandb
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.server.silent:
            time.sleep(0.1)
        answer: dict = {}
        if self.path.endswith(("graphql", "file_stream")):
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            asked = json.loads(raw)
            if "query" in asked:
                told = self.server.told(asked["query"], asked.get("variables") or {})
                answer = {"data": told}
            elif rows := (asked.get("files") or {}).get("wandb-history.jsonl"):
                end = rows["offset"] + len(rows["content"])
                self.server.history[rows["offset"] : end] = rows["content"]
            if asked.get("complete"):
                self.server.codes.append(asked["exitcode"])
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST
