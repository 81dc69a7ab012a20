"""Allow one writer per shard. A claim is a file beside the store with host, process and
a heartbeat. It is created exclusively, by linking the file to its name, so that a claim
never exists without its owner.

A file system without hard links (exFAT, some of FUSE and SMB) refuses that. There the
file is created exclusively (O_EXCL), and the owner is written into it next. One process
holds a claim there, too. But a process that is killed between the two steps, which take
less than a millisecond, leaves a claim without an owner. Nobody can tell that its owner
is dead, so such a claim is taken over ``STALE`` seconds later.

A claim's heartbeat is its modification time, which a thread renews while the claim is
held. A claim of this machine is dead if its process is gone. A claim of another machine
is dead if its heartbeat is ``STALE`` seconds behind the file system's own clock. Dead
claims are taken over.

A claim names host, boot and namespace of its process (processes.py). A claim that
differs in any of the three is of another machine.

An engine such as Kubernetes or SLURM starts a lost worker again, and only then. A claim
names the engine's worker, too (``known_as``), so that the worker that takes its place
releases the lost worker's claims at once (``release``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from cache.system.durable import make_folder
from cache.system.processes import UNKNOWN, alive, place, started
from cache.system.signals import check, finishing

BEAT = 10.0  # seconds between heartbeats
SILENT = 3  # heartbeats
STALE = 300.0  # seconds without a heartbeat after which a claim of another machine is dead
TRIES = 100  # attempts at a step in which other processes may interfere
# Errors of os.link on file systems without hard links: which one depends on the system.
NO_LINKS = (
    *(errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.EINVAL, errno.EMLINK),
)
_living: set[str] = set()  # ids of the claims that this process holds
_worker: str | None = None  # the engine's name of this process (``known_as``)


def claims_of(path: Path) -> Path:
    """Return the folder of the claims on a store or a run. The folder lies beside the
    store, since a foreign folder inside a Zarr group makes readers warn. A symbolic
    link is resolved first, so every path to a store leads to the same claims folder."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not path.name:
        raise StoreError(f"{path} has no name of its own; name a folder in it")
    return path.with_name(path.name + ".claims")


class Claims(set[str]):
    """The names of the claims that ``claim`` holds."""

    def __init__(self, folder: Path, me: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.me = folder, me

    def lost(self, name: str) -> bool:
        """Return whether a claim that was held belongs to another process now: this
        process, or its disk, slept for longer than ``STALE``. Raises OSError if the
        disk doesn't answer."""
        return _owner(self.folder / name) != self.me


@contextmanager
def claim(folder: Path, *names: str) -> Iterator[Claims]:
    """Try to take the named claims. Give the claims that are held now, and release them
    at the end."""
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
            # Try all names, not only those in ``mine``: a full disk or a signal may
            # have come after a claim was taken and before its name was added.
            for name in names:
                with suppress(OSError):
                    # While this process slept, another may have taken the claim over.
                    if _owner(folder / name) == me:
                        (folder / name).unlink(missing_ok=True)
            _living.discard(me["claim"])  # from now on a claim that could not be released is dead
            with suppress(OSError):  # not empty: other processes still hold claims
                folder.rmdir()


def known_as(worker: str | None) -> None:
    """Name this process in the claims that it takes from now on. worker: a name that no
    other living process of the engine has, and that a process has again if the engine
    starts it anew; None: no engine started this process."""
    global _worker
    _worker = worker


def release(folder: Path, worker: str) -> int:
    """Release the claims that an earlier process took under the name ``worker``, which
    the engine gives to one living process only. Claims of living processes of this
    machine stay. Returns the number of released claims.

    Two containers of one machine may have one name in spite of that. So a claim of
    another container of this machine must be silent for some heartbeats, which takes
    half a minute at most.
    """
    released = 0
    for path in _claims_in(folder):
        if _gone(path, worker):
            with claim(folder, f"{path.name}.heir") as mine:
                if mine and _gone(path, worker):
                    path.unlink(missing_ok=True)
                    released += 1
    return released


def _gone(path: Path, worker: str) -> bool:
    """Return whether a claim is of an earlier process of a worker."""
    owner = _owner(path)
    if owner is None or owner.get("worker") != worker:
        return False
    if not _is_far(owner):
        return _dead(path)
    return any(owner.get(key) != place()[key] for key in ("host", "boot")) or _silent(path)


def _silent(path: Path) -> bool:
    """Wait until a claim's heart has missed some beats, or has beaten. Returns whether
    it was silent."""
    try:
        last = path.stat().st_mtime
        while (age := _age(path)) is not None and age < SILENT * BEAT:
            time.sleep(min(1.0, BEAT / 4))
            check()
            if path.stat().st_mtime != last:
                return False
    except FileNotFoundError:
        return False
    return age is not None


def held_names(folder: Path) -> set[str]:
    """Return the names of all claims, also those of dead processes: one look at the
    folder."""
    return {path.name for path in _claims_in(folder)}


def held(folder: Path, name: str) -> bool:
    """Return whether a living process holds the claim."""
    return (folder / name).exists() and not _dead(folder / name)


def living(folder: Path, names: Set[str]) -> set[str]:
    """Return those of the names under which a living process holds a claim, with one
    look at the file system's clock for all."""
    there = held_names(folder) & names
    now = _now(folder) if there else None
    return {name for name in there if not _dead(folder / name, now)}


def _claims_in(folder: Path) -> list[Path]:
    """Return the claims in a folder, without momentary files and rights to remove."""
    return [path for path in _files(folder) if "." not in path.name]


def holders(folder: Path) -> list[str]:
    """Return the holders of claims now: "host:process", one per claim of a living
    process."""
    owners = [_owner(path) for path in _claims_in(folder) if not _dead(path)]
    return [f"{owner['host']}:{owner['process']}" for owner in owners if owner]


def sweep(folder: Path) -> None:
    """Remove the files that dead processes left, once the work is done."""
    for path in _files(folder):
        if _is_litter(path):
            path.unlink(missing_ok=True)
        elif _dead(path):
            with claim(folder, path.name):  # another process may have taken it over since
                pass
    with suppress(OSError):  # not empty: other processes still hold claims
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    """Return the files of a claims folder. Without a folder there are none: the process
    that releases the last claim removes the folder."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def _make(folder: Path) -> None:
    for _ in range(TRIES):
        with suppress(FileExistsError):  # the folder was there, and was then removed
            return make_folder(folder)
    make_folder(folder)


def _take(path: Path, me: dict[str, Any]) -> bool:
    for _ in range(TRIES):
        # Write the claim to another file, then link its name, which fails if the name
        # is taken. So a claim never exists without its owner.
        fresh = _scratch(path, "new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(me))
            _link(fresh, path)
            return True
        except FileExistsError:
            # The claim was released meanwhile, or its empty folder was removed.
            if not path.exists():
                continue
            if not _dead(path):
                return False
            # The right to remove a dead claim is a claim, too. Its holder looks at the
            # dead claim once more before the removal.
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


def _link(fresh: Path, path: Path) -> None:
    """Give a written file the name ``path``. Raises FileExistsError if the name is
    taken. Without hard links, the name is created first and its content is written
    next."""
    try:
        os.link(fresh, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        content = fresh.read_bytes()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(descriptor, "wb") as f:
                f.write(content)
        except BaseException:  # a full disk, a signal: nobody would know whose claim it is
            path.unlink(missing_ok=True)
            raise


def _scratch(path: Path, kind: str) -> Path:
    """Return a name for a momentary file of this process. The name tells the process,
    even while the file is empty."""
    return path.with_name(f"{path.name}.{_place_key()}.{os.getpid()}.{uuid.uuid4().hex}.{kind}")


def _is_litter(path: Path) -> bool:
    """Return whether a file is a momentary file of a process of this machine that is
    gone."""
    *_, place, process, _, kind = ["", "", "", "", *path.name.split(".")]
    return (
        kind in ("new", "clock")
        and place == _place_key()
        and process.isdecimal()
        and not alive(int(process))
    )


def _place_key() -> str:
    return hashlib.sha256(json.dumps(place()).encode()).hexdigest()[:12]


def _dead(path: Path, now: float | None = None) -> bool:
    owner = _owner(path)
    if owner and not _is_far(owner):
        if (
            owner["process"] == os.getpid()
            and owner["started"] == started(os.getpid())
            and "claim" in owner
        ):
            return owner["claim"] not in _living
        found = started(owner["process"])
        return found is None or (
            found != owner["started"] and UNKNOWN not in (found, owner["started"])
        )
    age = _age(path, now)
    return age is not None and age > STALE


def _now(folder: Path) -> float | None:
    """Return the time by the file system's own clock; None if there is no folder."""
    probe = _scratch(folder / "now", "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _age(path: Path, now: float | None = None) -> float | None:
    """Return the seconds since a claim's last heartbeat; None if there is no claim."""
    try:
        now = _now(path.parent) if now is None else now
        return None if now is None else now - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_far(owner: dict[str, Any]) -> bool:
    """Return whether a claim's owner is a process of another machine."""
    return {key: owner.get(key) for key in place()} != place()


def _me() -> dict[str, Any]:
    me = {**place(), "process": os.getpid(), "started": started(os.getpid())}
    return me | ({"worker": _worker} if _worker else {})


def _owner(path: Path) -> dict[str, Any] | None:
    """Return the owner of a claim; None if there is no claim, or none that can be read.
    Raises OSError if the disk doesn't answer."""
    try:
        owner = json.loads(path.read_text())
        return owner if {"host", "process", "started"} <= owner.keys() else None
    except (FileNotFoundError, PermissionError, ValueError, AttributeError):
        return None


def _beat(mine: Claims, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        for name in mine:
            with suppress(OSError):
                if not mine.lost(name):
                    _renew(mine.folder / name)


def _renew(path: Path) -> None:
    """Set a claim's modification time to now. Where a file system doesn't let that be
    set, the first byte of the file is written again."""
    try:
        os.utime(path)
    except OSError:
        with open(path, "r+b", buffering=0) as f:
            f.write(b"{")
