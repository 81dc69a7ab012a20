"""One writer per shard: claims, which are exclusively created (linked) files beside the
store, with host, process and a heartbeat.

A claim's heartbeat is its modification time, renewed by a thread while it is held. A
claim is dead if its process is gone from this machine, or, from another one, if its
heartbeat is ``STALE`` seconds behind the file system's own clock. Dead claims are taken
over.

Process numbers mean something only where they were given: in one boot of one kernel, in
one namespace of process numbers. Containers on a cluster may share a host name and all
be process 7, so a claim names all three, and anything else is another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from cache.system.durable import make_folder
from cache.system.signals import finishing

BEAT = 10.0  # seconds between heartbeats
STALE = 300.0  # seconds without one after which a claim of another host is dead
TRIES = 100  # of what others may get in the way of
_living: set[str] = set()  # of this process's claims
UNKNOWN = "unknown"  # start time of a process that is there and can't be looked at


def claims_of(path: Path) -> Path:
    """The folder of the claims on a store or a run: beside it, since a foreign folder
    inside a Zarr group makes readers warn. Whoever calls a store by a link to it, has
    the same."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    return path.with_name(path.name + ".claims")


class Claims(set[str]):
    """The names of the claims that ``claim`` holds."""

    def __init__(self, folder: Path, me: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.me = folder, me

    def lost(self, name: str) -> bool:
        """Whether a claim that was held is another's now: this process slept, or its
        disk did, for longer than ``STALE``. Raises OSError if that can't be told."""
        return _owner(self.folder / name) != self.me


@contextmanager
def claim(folder: Path, *names: str) -> Iterator[Claims]:
    """Try to hold the named claims; gives those that are held, and lets go of them at
    the end."""
    me = _me() | {"claim": uuid.uuid4().hex}
    mine = Claims(folder, me)
    _living.add(me["claim"])
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(mine, stop), daemon=True)
    try:
        with finishing():
            _make(folder)
            mine.update(name for name in names if _take(folder / name, me))
            heart.start()
        yield mine
    finally:
        with finishing():
            stop.set()
            if heart.ident is not None:
                heart.join()
            # all: a full disk, or a signal, may have come between taking one and
            # knowing it
            for name in names:
                with suppress(OSError):
                    if _owner(folder / name) == me:
                        # unless it was taken over, while this process was asleep
                        (folder / name).unlink(missing_ok=True)
            _living.discard(me["claim"])  # so that one which could not be let go of is dead
            with suppress(OSError):  # not empty: others still hold claims
                folder.rmdir()


def holders(folder: Path) -> list[str]:
    """Who holds claims now: "host:process", one per claim of a living process."""
    owners = [_owner(path) for path in _files(folder) if "." not in path.name and not _dead(path)]
    return [f"{owner['host']}:{owner['process']}" for owner in owners if owner]


def sweep(folder: Path) -> None:
    """Remove what dead processes left, once the work is done."""
    for path in _files(folder):
        if _is_litter(path):
            path.unlink(missing_ok=True)
        elif _dead(path):
            with claim(folder, path.name):  # another may have taken it over since
                pass
    with suppress(OSError):  # not empty: others still hold claims
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    """None where there is no folder: whoever lets go of the last claim removes it."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def _make(folder: Path) -> None:
    for _ in range(TRIES):
        with suppress(FileExistsError):  # it was there, and then removed
            return make_folder(folder)
    make_folder(folder)


def _take(path: Path, me: dict[str, Any]) -> bool:
    for _ in range(TRIES):
        # Written elsewhere and then linked to its name, which fails if the name is
        # taken: a claim is there with its owner, or not at all.
        fresh = _scratch(path, "new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(me))
            os.link(fresh, path)
            return True
        except FileExistsError:
            # it was let go of, or the folder was removed, being empty, while this made
            # it
            if not path.exists():
                continue
            if not _dead(path):
                return False
            # itself a claim: only its holder removes a dead one, and looks once more
            # before
            heir = path.with_name(f"{path.name}.heir")
            if not _take(heir, me):
                return False
            try:
                if _dead(path):
                    path.unlink(missing_ok=True)
            finally:
                heir.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
        finally:
            fresh.unlink(missing_ok=True)
    return False


def _scratch(path: Path, kind: str) -> Path:
    """A name for a file that this process needs for a moment; it tells whose it is,
    even while the file is empty."""
    return path.with_name(f"{path.name}.{_place_key()}.{os.getpid()}.{uuid.uuid4().hex}.{kind}")


def _is_litter(path: Path) -> bool:
    """Whether it is a momentary file of a process of this machine that is gone."""
    *_, place, process, _, kind = ["", "", "", "", *path.name.split(".")]
    return (
        kind in ("new", "clock")
        and place == _place_key()
        and process.isdecimal()
        and not alive(int(process))
    )


def _place_key() -> str:
    return hashlib.sha256(json.dumps(_place()).encode()).hexdigest()[:12]


def _dead(path: Path) -> bool:
    owner = _owner(path)
    if owner and {key: owner.get(key) for key in _place()} == _place():
        if (
            owner["process"] == os.getpid()
            and owner["started"] == _started(os.getpid())
            and "claim" in owner
        ):
            return owner["claim"] not in _living
        started = _started(owner["process"])
        return started is None or (
            started != owner["started"] and UNKNOWN not in (started, owner["started"])
        )
    probe = _scratch(path, "clock")
    try:
        probe.touch()
        age = probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return age > STALE


def _me() -> dict[str, Any]:
    return {**_place(), "process": os.getpid(), "started": _started(os.getpid())}


@cache
def _place() -> dict[str, Any]:
    """Where a process number means something."""
    boot = namespace = None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds a claim; None if there is none, or it says nothing that can be read.
    Raises OSError if the disk doesn't answer."""
    try:
        owner = json.loads(path.read_text())
        return owner if {"host", "process", "started"} <= owner.keys() else None
    except (FileNotFoundError, PermissionError, ValueError, AttributeError):
        return None


def held(folder: Path, name: str) -> bool:
    """Whether a living process holds the claim."""
    return (folder / name).exists() and not _dead(folder / name)


def alive(process: int) -> bool:
    """Whether a process of this host is running."""
    return _started(process) is not None


def _started(process: int) -> str | None:
    """The kernel's start time of a process, which tells it from a later one with the
    same number; None if it is gone."""
    try:
        with open(f"/proc/{process}/stat") as f:
            state = f.read().rpartition(")")[2].split()
    except OSError:  # it is gone, or another user's, which the system may hide
        return _signalled(process)
    # killed but not collected by its parent: it does nothing any more
    return None if state[0] in "ZX" else state[19]


def _signalled(process: int) -> str | None:
    """UNKNOWN if there is such a process, None if there is not."""
    try:
        if type(process) is int and process > 0:
            os.kill(process, 0)
            return UNKNOWN
    except PermissionError:
        return UNKNOWN
    except (OSError, OverflowError):
        pass
    return None


def _beat(mine: Claims, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        for name in mine:
            with suppress(OSError):
                if not mine.lost(name):
                    os.utime(mine.folder / name)
