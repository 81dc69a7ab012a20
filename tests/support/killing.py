"""Start commands, mostly ``generate-labels``, and kill them with SIGKILL at a chosen
moment.

A run takes half a second instead of nine: it is forked from a server that has imported
every module already. (DALI, torch and Zarr start no thread while they are imported, so
forking is safe; ``Server`` counts the threads.) An event is a call that changes
something beside or in the store, or the reading of an image. A run writes its events to
a log and can kill itself at the n-th event, so every phase can be met on purpose.
"""

from __future__ import annotations

import builtins
import io
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from support.paths import ROOT

HEAVY = [
    *(
        "pytest",
        "torch",
        "timm",
        "zarr",
        "nvidia.dali",
        "matplotlib.figure",
        "matplotlib.ticker",
        "matplotlib.backends.backend_agg",
    ),
    *(
        "tensorboard.summary.writer.record_writer",
        "tensorboard.compat.proto.event_pb2",
        "tensorboard.compat.proto.summary_pb2",
    ),
    *(
        "pipeline.labelling.generate",
        "pipeline.exchange.import_labels",
        "pipeline.exchange.export_labels",
        "cli",
        "support.killing",
    ),
]
HANGS = 300  # seconds; no run takes longer


@dataclass(frozen=True)
class Moment:
    """The moment at which a run kills itself."""

    event: int  # the n-th event, from 0
    wait: float | None = None  # seconds after the event; None: at once, before its effect
    part: float = 0.0  # of a write, if wait is None: the share of the content that is written


@dataclass(frozen=True)
class Event:
    what: str  # open, write, rename, mkdir, …
    # relative to the store's parent folder; an image: "image"; of a rename the new name
    path: str


class Run:
    """A run that has been started."""

    def __init__(
        self,
        context: Any,
        folder: Path,
        arguments: list[str],
        store: Path,
        data: Path,
        moment: Moment | None,
    ) -> None:
        self.log, self.errors = folder / "events.txt", folder / "stderr.txt"
        given = (arguments, str(store.parent), str(data), str(self.log), str(self.errors), moment)
        self.process = context.Process(target=_run, args=given)
        self.process.start()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> int:
        """Wait for the run's end and return its exit status, -9 if it was killed."""
        self.process.join(HANGS)
        assert self.process.exitcode is not None, f"a run hangs:\n{self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""

    def events(self) -> list[Event]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [Event(*line.split(" ", 1)) for line in lines]


class Server:
    """The server that runs of one recipe on one data folder are forked from."""

    def __init__(self, folder: Path, config: Path, data: Path) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.number = itertools.count()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(HEAVY)
        with _environment(
            PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            OMP_NUM_THREADS="1",
            OPENBLAS_NUM_THREADS="1",
        ):
            forkserver.ensure_running()
        pipe, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_state_of_the_server, args=(theirs,))
        process.start()
        imported, threads = pipe.recv()
        process.join()
        assert imported == HEAVY and threads == 1, (
            f"forked with {threads} threads, after the import of {imported}"
        )

    def start(self, store: Path, *options: str, moment: Moment | None = None) -> Run:
        return self.command(
            store, ["generate-labels", f"--config={self.config}", "--device=cpu", *options], moment
        )

    def command(self, store: Path, command: list[str], moment: Moment | None = None) -> Run:
        """Start any command that takes --data and --store."""
        folder = self.folder / f"run{next(self.number)}"
        folder.mkdir()
        arguments = [*command, f"--data={self.data}", f"--store={store}"]
        return Run(self.context, folder, arguments, store, self.data, moment)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


# ---- the functions below run in the forked process


def _state_of_the_server(pipe: Any) -> None:
    pipe.send(
        (
            [name for name in HEAVY if name in sys.modules],
            len(os.listdir(f"/proc/{os.getppid()}/task")),
        )
    )


def _run(
    arguments: list[str], beside: str, data: str, log: str, errors: str, moment: Moment | None
) -> None:
    import torch

    import cli
    from pipeline.labelling import coordination

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    # seconds to wait for a neighbour that was killed while it made the empty store
    coordination.PATIENCE = 1.0
    _watch(beside, data, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), moment)
    cli.main(arguments)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(HANGS)  # a signal may reach another thread first


def _watch(beside: str, data: str, log: int, moment: Moment | None) -> None:
    """Note every event below the folder ``beside`` and every image read from ``data``,
    and kill the process at ``moment``."""
    counted = itertools.count()

    def happens(what: str, path: Any, folder: int = -1) -> bool:
        """Note an event, and return True if the run must die in it. The caller kills
        the run, perhaps after half of the event."""
        path = os.fsdecode(path)
        if folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        if path.startswith(beside + os.sep):
            path = path[len(beside) + 1 :]
        elif path != beside and path.startswith(data + os.sep):
            path = "image"
        elif path != beside:
            return False
        os.write(log, f"{what} {path}\n".encode())
        if moment is None or next(counted) != moment.event:
            return False
        if moment.wait is None:
            return True
        threading.Timer(moment.wait, _die).start()
        return False

    def hook(name: str, given: tuple) -> None:
        dies = False
        if name == "open":
            path, _, flags = given
            if not isinstance(path, int) and (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or str(path).startswith(data)
            ):
                dies = happens("open", path)
        elif name in ("os.mkdir", "os.remove", "os.rmdir"):
            dies = happens(name[3:], given[0], given[-1])
        elif name in ("os.rename", "os.link"):
            dies = happens(name[3:], given[1], given[3])
        if dies:
            _die()

    def opened(*given: Any, **named: Any) -> Any:
        """Open a file whose writing a kill can cut short. Zarr and pathlib write a
        small file in one call: from its opening to the end of the call, the file is
        empty or cut short."""
        file = real_open(*given, **named)
        mode = given[1] if len(given) > 1 else named.get("mode", "r")
        if "r" not in mode or "+" in mode:
            write, path = file.write, given[0]

            def torn(content: Any) -> int:
                if happens("write", path):
                    write(content[: int(len(content) * moment.part)])
                    file.flush()
                    _die()
                return write(content)

            file.write = torn
        return file

    def fsync(descriptor: int) -> None:
        """Note an fsync, and force nothing to the disk. A kill loses nothing that the
        kernel has, and the disk would take half of the time."""
        if happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}")):
            _die()

    real_open = io.open
    io.open = builtins.open = opened
    os.fsync = fsync
    sys.addaudithook(hook)
