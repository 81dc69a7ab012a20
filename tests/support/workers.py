"""Start workers as real processes, and hold, signal or kill them at a chosen moment."""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import itertools
import os
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache import LabelStore
from support.killing import HANGS, HEAVY
from support.paths import ROOT

VIEWS = 3
ROWS = 4  # rows of a shard
SOON = 20.0  # seconds in which a signal is obeyed; it takes one or two
CAP_DAC_OVERRIDE = 1  # linux/capability.h: root may write where permissions say no
# seconds added to a write, so that no run ends before the other runs begin
SLOW = 0.1
FILLER = "filler"  # a file that fills a small disk
# modules that runs import in addition to HEAVY
ALSO = [
    *(
        "support.workers",
        "pipeline.training.train",
        "pipeline.inspection.relabel",
        "pipeline.inspection.terminal",
        "pipeline.evaluation",
    )
]


@dataclass(frozen=True)
class When:
    """The n-th event of a kind on a matching path, and what happens to the run just
    before the event."""

    # read or write: the run opens the file; rename, link, remove; forget: its main
    # thread is done with a DALI pipeline
    what: str
    path: str  # regular expression
    then: str  # a signal; hold: the run waits for release(); full: the disk is full from now on
    nth: int = 1
    # regular expression: events count once a file was linked or renamed to such a path
    after: str = ""


@dataclass(frozen=True)
class Write:
    """One write of a shard by a run."""

    process: int
    view: int
    shard: int
    begins: float
    ends: float  # infinity: the write came to no end


class Run:
    """A command that has been started."""

    def __init__(self, context: Any, folder: Path, arguments: list[str], **how: Any) -> None:
        folder.mkdir()
        self.folder, self.ended = folder, 0.0
        self.process = context.Process(target=_run, args=(arguments, str(folder), how), daemon=True)
        self.process.start()

    def text(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def said(self) -> str:
        return self.text("stderr")

    def end(self) -> int:
        """Wait for the run's end and return its exit status, negative if a signal ended
        it."""
        self.process.join(HANGS)
        self.ended = time.monotonic()
        assert self.process.exitcode is not None, f"a run hangs:\n{self.said()}"
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def signal(self, name: str) -> None:
        with open(self.folder / "signals", "a") as f:
            f.write(f"{time.monotonic()}\n")
        os.kill(self.process.pid, getattr(signal, name))

    def wait(self, done: Callable[[], bool], what: str) -> None:
        patience = time.monotonic() + HANGS
        while not done():
            assert self.process.exitcode is None, (
                f"it ended, status {self.process.exitcode}, and never {what}:\n{self.said()}"
            )
            assert time.monotonic() < patience, f"it never {what}:\n{self.said()}"
            time.sleep(0.005)

    def wait_for(self, text: str) -> None:
        """Wait until the run has written ``text`` to stderr."""
        self.wait(lambda: text in self.said(), f"said {text!r}")

    def wait_held(self) -> None:
        self.wait((self.folder / "held").exists, "came there")

    def release(self) -> None:
        (self.folder / "go").touch()

    def stopped_after(self) -> float:
        """Return the seconds between the first signal and the run's end."""
        return self.ended - float(self.text("signals").split()[0])

    def failed_with(self) -> str:
        """Wait until the run fails, and return the one line that says why."""
        assert self.end() == 1, self.said()
        lines = [
            line for line in self.said().splitlines() if line.startswith(("error:", "stopped"))
        ]
        assert len(lines) == 1 and lines[0] == self.said().splitlines()[-1], self.said()
        require_no_trace(self)
        return lines[0]


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder. (Runs import this module too, and an import of
    scikit-learn at its top would take each run a second.)"""
    from support import small

    return small.tree(folder)


def require_no_trace(run: Run) -> None:
    """Require that a run has printed no traceback, not even one of a thread or of the
    interpreter's end."""
    assert not re.search(r"Traceback|Exception ignored|Error in|^\s+File ", run.said(), re.M), (
        run.said()
    )


class House:
    """One recipe on one data set, in a folder that everybody may read, and the server
    that runs are forked from."""

    def __init__(self, folder: Path, config: Path, data: Path) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.number = itertools.count()
        self.runs: list[Run] = []
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload([*HEAVY, *ALSO])  # if no other test has started it
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("OPENBLAS_NUM_THREADS", "1")
            forkserver.ensure_running()

    def start(self, *arguments: object, **how: Any) -> Run:
        self.runs.append(
            Run(
                self.context,
                self.folder / f"run{next(self.number)}",
                [str(a) for a in arguments],
                **how,
            )
        )
        return self.runs[-1]

    def end(self) -> None:
        """Kill the runs that a failed test has left."""
        while self.runs:
            self.runs.pop().kill()


@dataclass
class Place:
    """The place of one test's store: s.zarr, alone in a folder."""

    house: House
    whole: Path  # the store of a single undisturbed process
    folder: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "s.zarr"
        self.log = self.folder.with_name(self.folder.name + ".writes")
        self.log.touch()

    def start(self, *options: object, data: Path | None = None, **how: Any) -> Run:
        """Start generate-labels with these options."""
        arguments = [
            "generate-labels",
            f"--config={self.house.config}",
            f"--data={data or self.house.data}",
            f"--store={self.path}",
        ]
        return self.house.start(*arguments, "--device=cpu", *options, log=str(self.log), **how)

    def run(self, *options: object, **how: Any) -> str:
        """Run generate-labels to its good end, and return its stderr."""
        run = self.start(*options, **how)
        assert run.end() == 0, run.said()
        require_no_trace(run)
        return run.said()

    def begin(self, views: int, labelled: int | None = None) -> None:
        """Put a store of ``views`` views here, made by one process. labelled: the
        number of finished shards; None: all."""
        shutil.copytree(self.whole.with_name(f"{views}.zarr"), self.path)
        for number, record in enumerate(sorted((self.path / "records" / "c").glob("*/*/0"))):
            if labelled is not None and number >= labelled:
                view, shard, _ = record.parts[-3:]
                for file in self.path.glob(f"*/c/{view}/{shard}"):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()

    def writes(self) -> list[Write]:
        begun: dict[tuple[int, int, int], float] = {}
        found = []
        for line in self.log.read_text().splitlines():
            what, process, view, shard, moment = line.split()
            key = int(process), int(view), int(shard)
            if what == "begins":
                begun[key] = float(moment)
            else:
                found.append(Write(*key, begun.pop(key), float(moment)))
        return found + [Write(*key, moment, np.inf) for key, moment in begun.items()]

    def kept(self) -> dict[str, tuple[int, int]]:
        """Require every file of a finished shard to be the file of a single process,
        and return the inode and time of each."""
        if not self.path.exists():
            return {}
        store, files = LabelStore.open(self.path), {}
        for view, shard in np.argwhere(store.finished()).tolist():
            for name in ("labels", *store.crop_arrays, "records"):
                file = store.file(name, view, shard)
                inside = str(file.relative_to(self.path))
                assert file.read_bytes() == (self.whole / inside).read_bytes(), (
                    f"{inside} is believed and wrong"
                )
                files[inside] = (file.stat().st_ino, file.stat().st_mtime_ns)
        return files

    def left(self) -> set[str]:
        """List files in or beside the store that a finished store doesn't have."""
        left = {str(file.relative_to(self.folder)) for file in self.folder.rglob("*")}
        return (
            left
            - {"s.zarr", FILLER}
            - {f"s.zarr/{file.relative_to(self.whole)}" for file in self.whole.rglob("*")}
        )

    def require_whole(self, *lost: Run) -> None:
        """Require the store of a single process, no other file, and no shard written
        twice except the shards in flight in a lost run."""
        assert not self.left()
        made, wanted = tree(self.path), tree(self.whole)
        assert sorted(made) == sorted(wanted)
        assert [name for name in wanted if made[name] != wanted[name]] == []
        require_single_writers(self.writes(), lost)


def require_single_writers(writes: list[Write], broken: tuple[Run, ...] = ()) -> None:
    """Require that no shard was written by two runs at once, or again once it was
    finished. ``broken``: runs that were killed or failed in a write."""
    lost = {run.process.pid for run in broken}
    assert {write.process for write in writes if write.ends == np.inf} <= lost, (
        "a write came to no end"
    )
    places: dict[tuple[int, int], list[Write]] = {}
    for write in sorted(writes, key=lambda write: write.begins):
        places.setdefault((write.view, write.shard), []).append(write)
    for place, several in places.items():
        *before, _ = several
        assert all(write.process in lost for write in before), (
            f"view {place[0]}, shard {place[1]} was written twice: {several}"
        )
        for one, next_one in itertools.pairwise(several):
            assert one.ends <= next_one.begins or one.ends == np.inf, (
                f"two wrote view {place[0]}, shard {place[1]} at once: {several}"
            )


# ---- the functions below run in the forked processes


def _run(arguments: list[str], folder: str, how: dict) -> None:
    import torch

    import cli
    from cache.system import claims
    from cache.system.claims import BEAT, STALE
    from pipeline.labelling import coordination

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chmod(folder, 0o777)
    torch.set_num_threads(1)
    # Without fsync: a kill loses nothing that the kernel has, and the disk would take
    # half of the time.
    os.fsync = lambda descriptor: None
    os.environ.update(how.get("environment", {}))
    coordination.PATIENCE = how.get("patience", 60.0)
    if "host" in how:  # as if the run were on this host
        socket.gethostname = lambda: how["host"]
    claims.STALE, claims.BEAT = how.get("stale", STALE), min(BEAT, how.get("stale", 100.0) / 10)
    if "log" in how:
        _log_writes(os.open(how["log"], os.O_WRONLY | os.O_APPEND), how.get("slow", 0.01))
    if "refuses" in how:
        poor_disk(how["refuses"])
    _watch(folder, how.get("whens", ()), how.get("disk"))
    if how.get("obeys"):
        obey_permissions()
    cli.main(arguments)


def poor_disk(number: int = errno.EPERM) -> None:
    """Let this process believe that its disks are such as exFAT: hard links,
    permissions, times and fsync of a folder are refused. number: of the error of a
    link."""

    def refused(number: int) -> Callable:
        def refuse(*given: object, **named: object) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    os.link, os.fsync = refused(number), fsync
    os.chmod = os.utime = refused(errno.EPERM)


def obey_permissions() -> None:
    """Let permissions stop this process from writing even if it is root's, as they stop
    any other user.

    The process stays root and may read everything. As another user it could not import
    further modules from a checkout below a folder of mode 700.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for number in (0, 1):
        sets[number] &= ~(1 << CAP_DAC_OVERRIDE)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _log_writes(log: int, slow: float) -> None:
    """Note when each write of a shard begins and ends, and add ``slow`` seconds to it,
    so that two writers of one shard are seen."""
    from cache.writer import StoreWriter

    def note(what: str, view: int, shard: int) -> None:
        os.write(log, f"{what} {os.getpid()} {view} {shard} {time.monotonic()}\n".encode())

    def write(self: StoreWriter, view: int, shard: int, *arrays: np.ndarray) -> None:
        note("begins", view, shard)
        time.sleep(slow)
        real(self, view, shard, *arrays)
        note("ends", view, shard)

    real, StoreWriter.write = StoreWriter.write, write


def _watch(folder: str, whens: tuple[When, ...], disk: str | None) -> None:
    """Watch for the events of ``whens``, and carry out the ``then`` of each. ``disk``:
    the small file system to fill; None: writing itself fails as on a full disk."""
    from nvidia import dali

    counts = [itertools.count(1) for _ in whens]
    waiting = {when.after for when in whens if when.after}
    full = threading.Event()

    def happens(what: str, path: object) -> None:
        path = os.fsdecode(path)
        for when, count in zip(whens, counts, strict=True):
            if (
                when.what == what
                and when.after not in waiting
                and re.search(when.path, path)
                and next(count) == when.nth
            ):
                befall(when.then)
        if what in ("link", "rename"):
            waiting.difference_update([after for after in waiting if re.search(after, path)])

    def befall(then: str) -> None:
        if then == "hold":
            os.close(os.open(f"{folder}/held", os.O_WRONLY | os.O_CREAT))
            while not os.path.exists(f"{folder}/go"):
                time.sleep(0.005)
        elif then == "full":
            fill(disk) if disk else full.set()
        else:
            descriptor = os.open(f"{folder}/signals", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{time.monotonic()}\n".encode())
            os.close(descriptor)
            os.kill(os.getpid(), getattr(signal, then))
            if then == "SIGKILL":
                time.sleep(HANGS)

    def hook(name: str, given: tuple) -> None:
        if name == "open" and isinstance(given[0], str | bytes | os.PathLike):
            happens(
                "write" if given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "read", given[0]
            )
        elif name in ("os.rename", "os.link"):
            happens(name[3:], given[1])
        elif name == "os.remove":
            happens("remove", given[0])

    def opened(*given: Any, **named: Any) -> Any:
        file = real_open(*given, **named)
        if full.is_set() and file.writable():
            file.write = refuse
        return file

    def refuse(content: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a name, as from write()

    def __del__(self: dali.Pipeline) -> None:
        # Signals are handled in the main thread.
        if threading.current_thread() is threading.main_thread():
            happens("forget", "pipeline")
        real_forget(self)

    real_open, real_forget = io.open, dali.Pipeline.__del__
    dali.Pipeline.__del__ = __del__
    if not disk:
        io.open = builtins.open = opened
    sys.addaudithook(hook)


def fill(disk: str | Path) -> None:
    """Write until nothing more fits."""
    descriptor = os.open(f"{disk}/{FILLER}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (1 << 16, 1):
        with suppress(OSError):
            while True:
                os.write(descriptor, bytes(size))
    os.close(descriptor)
