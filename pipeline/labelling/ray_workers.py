"""Label on the nodes of a Ray cluster: the worker that Ray starts there (--ray).

Each worker is a Ray actor with an open share of the store, so workers may come and go.
The labelling itself runs in a child process of the actor, exactly as generate-labels
runs it: a signal stops it in order, and a crash of a library ends the child alone. If
the actor is killed, its child ends at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from cache.system.claims import claims_of
from cache.system.signals import on_signals
from pipeline.config import Config
from pipeline.images.sources.remote.url import Url
from pipeline.labelling.shares import Share
from pipeline.runtime import progress
from pipeline.runtime.engine import Worker
from pipeline.runtime.failures import line_of

SHARED = 15.0  # seconds in which a cluster's disk shows a new file to another node


@dataclass(frozen=True)
class RayTask:
    """What workers label: the arguments of ``generate``, as far as any node understands
    them.

    data: names the images, as ``DataSet.find`` takes it. classes: the class map.
    store: on a disk that all nodes share. device: "cpu" or "cuda"; None: as the cluster
    has. token: name of the driver's claim, by which a node knows that it sees the same
    disk.
    """

    config: Config
    data: Path | Url
    split: str
    classes: list[str] | None
    store: Path
    device: str | None = None
    first_view: int = 0
    strict: bool = False
    check: bool = True
    token: str = ""

    def anywhere(self) -> RayTask:
        """Return the task with absolute paths of images, store and weights."""
        teachers = [
            teacher.model_copy(
                update={"checkpoint": teacher.checkpoint and os.path.abspath(teacher.checkpoint)}
            )
            for teacher in self.config.teachers
        ]
        return replace(
            self,
            config=self.config.model_copy(update={"teachers": teachers}),
            data=self.data.absolute() if isinstance(self.data, Path) else self.data,
            store=self.store.absolute(),
        )

    def label(self, worker: Worker) -> None:
        """Label as one worker."""
        from pipeline.images.data_set import DataSet
        from pipeline.labelling.generate import generate
        from pipeline.models.weights import require_known
        from pipeline.runtime.distributed import own_device
        from pipeline.runtime.execution import Execution

        self._require_shared_disk()
        require_known(self.config.teachers)  # before images are fetched
        share = Share.open_to(worker, self.first_view, self.config.store.views_per_decode)
        data = DataSet.find(self.data, self.split, self.classes)
        execution = Execution(own_device(self.device), worker=worker)
        generate(
            self.config,
            data,
            self.store,
            execution,
            share=share,
            strict=self.strict,
            check=self.check,
        )

    def _require_shared_disk(self) -> None:
        until = time.monotonic() + SHARED
        while not (claims_of(self.store) / self.token).exists():
            if time.monotonic() > until:
                raise StoreError(
                    f"{self.store} on the node {os.uname().nodename} is not the place that the "
                    f"driver sees; put --store on a disk that all nodes share"
                )
            time.sleep(0.5)


class RayWorker:
    """A Ray actor that labels in a child process."""

    def __init__(self) -> None:
        self.child: Any = None
        self.lines: list[str] = []
        self.count = ("", 0, 0, "")  # what, done, total, unit

    def label(self, task: RayTask, worker: Worker) -> tuple[str, str]:
        """Label until the store is complete. Returns how that ended: "done", "stopped",
        "failed" or "lost", and a line about it."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        self.child = spawn.Process(target=_label, args=(task, worker, theirs), daemon=True)
        self.child.start()
        theirs.close()
        ended = None
        with suppress(EOFError):
            while True:
                kind, content = ours.recv()
                if kind == "line":
                    self.lines.append(content)
                elif kind == "count":
                    self.count = content
                else:
                    ended = kind, content
        self.child.join()
        return ended or ("lost", f"its process ended with status {self.child.exitcode}")

    def report(self) -> tuple[list[str], tuple[str, int, int, str], str]:
        """Return the lines since the last report, the progress, and the node's name."""
        lines, self.lines = self.lines, []
        return lines, self.count, os.uname().nodename

    def stop(self) -> None:
        """Ask the child to finish the shard that it writes, and to end."""
        if self.child is not None:
            self.child.terminate()


def _label(task: RayTask, worker: Worker, pipe: Connection) -> None:
    """Label in a child process of an actor, and tell the actor what happens."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sending = threading.Lock()

    def tell(kind: str, content: object) -> None:
        with sending, suppress(OSError):
            pipe.send((kind, content))

    progress.divert(
        lambda line: tell("line", line),
        lambda p: tell("count", (p.what, p.done, p.total, p.unit)),
    )
    try:
        with on_signals():
            task.label(worker)
        tell("done", "")
    except KeyboardInterrupt:
        tell("stopped", "")
    except BaseException as error:
        tell("failed", line_of(error) or traceback.format_exc())


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
