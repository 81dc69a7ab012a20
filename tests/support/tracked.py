"""Read what Weights & Biases keeps of an offline run, and stand in for a server that
hangs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
