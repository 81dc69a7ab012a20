"""Hold fetched files in the cache folder, within a bound.

``remote/`` in the cache folder holds a folder per folder of a store (a set): its
fetched files, and partial files whose final size is in their name. A process that uses
a set holds a claim on it, so the files of a set that no living process uses may be
removed for others: those of the set whose use lies back longest first.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from cache.system import durable
from cache.system.claims import claim, held
from cache.system.signals import check
from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.remote.store import Object

SIZE = "OFFLINE_MEAL_CACHE_SIZE"  # names the bound
UNITS = {unit: 1000**i for i, unit in enumerate(("", "K", "M", "G", "T", "P"))}
UNITS |= {f"{unit}I": 1024**i for i, unit in enumerate(("", "K", "M", "G", "T", "P")) if i}
USED = "used"  # a file of a set, whose time of change is that of the last use
PART = ".part"
MOMENT = "moment"  # in the names of files that are here for a moment
_lock = threading.Lock()  # one admission at a time in this process


def bytes_of(text: str) -> int:
    """Read a size: 200GB, 1.5 TiB, 5000000. Raises DataError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGTP]?I?)B?\s*", text.upper())
    if not found or found[2] not in UNITS:
        raise DataError(
            f"{SIZE} is {text!r}, which is no size; write for example {SIZE}=200GB or 1.5TiB"
        )
    return int(float(found[1]) * UNITS[found[2]])


def shown(size: float) -> str:
    """Return a size for people: 150.3 GB."""
    for unit in ("GB", "MB", "kB"):
        if size >= (factor := {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]):
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,.0f} bytes"


class Room:
    """The room for the objects of one data set. A process may have several.

    A set is in use from the making of a Room to its end, and to the end of the process
    at the latest. Raises OSError if the cache can't be written.
    """

    def __init__(self, objects: Sequence[Object]) -> None:
        self.folder = kept.cache_folder() / "remote"
        self.claims = self.folder / "claims"
        self.paths = [self._path(one) for one in objects]
        self.mine = {path.stem for path in self.paths}
        self.sets = sorted({path.parent for path in self.paths})
        self.me = uuid.uuid4().hex
        bound = os.environ.get(SIZE)
        self._bound = bytes_of(bound) if bound else None
        with ExitStack() as stack:
            for place in self.sets:
                durable.make_folder(place)
                (place / USED).touch()
                stack.enter_context(claim(self.claims, self._use(place)))
                if not self._used(place):  # left by a process that was killed
                    for path in place.glob(f"*.{MOMENT}*"):
                        path.unlink(missing_ok=True)
            self._end = weakref.finalize(self, stack.pop_all().close)

    def _path(self, one: Object) -> Path:
        of, about = one.url.parent.identity, f"{one.url.identity}\n{one.etag}\n{one.changed}"
        name = _digest(f"{about}\n{one.size}") + one.url.suffix
        return self.folder / _digest(of) / name

    def _use(self, place: Path) -> str:
        return f"use-{place.name}-{self.me}"

    def part(self, number: int, size: int) -> Path:
        """Return the place of a partial file. size: of the whole file."""
        path = self.paths[number]
        return path.with_name(f"{path.stem}.{size}{PART}")

    def moment(self, number: int, size: int) -> tuple[Path, Path]:
        """Return the places of a partial and a whole file that only this process
        uses, and removes."""
        path = self.paths[number]
        whole = path.with_name(f"{path.stem}.{MOMENT}{self.me}{path.suffix}")
        return whole.with_suffix(f".{size}{PART}"), whole

    def bound(self) -> int:
        """Return how many bytes fetched files may take on this machine:
        $OFFLINE_MEAL_CACHE_SIZE, otherwise half of the free space and of what fetched
        files take already."""
        if self._bound is not None:
            return self._bound
        return (shutil.disk_usage(self.folder).free + self.held()) // 2

    def held(self) -> int:
        """Return how many bytes all fetched files take, partial files in their final
        size."""
        return sum(size for place in self._all() for _, size in _files(place))

    def free_for_mine(self) -> int:
        """Return how many bytes the files of this data set may take: the bound, less
        what other processes use."""
        others = 0
        for place in self._all():
            if place not in self.sets and self._used(place):
                others += sum(size for _, size in _files(place))
        return max(0, self.bound() - others)

    def admit(self, part: Path, size: int) -> bool:
        """Make room for a file, by removing files that nobody uses, and begin its
        partial file. size: of the whole file, bytes. Returns False if there is no
        room."""
        if part.exists():
            return True
        with _lock:
            while True:
                with claim(self.claims, "room") as mine:
                    if mine:
                        return self._admit(part, size)
                time.sleep(0.02)
                check()

    def _admit(self, part: Path, size: int) -> bool:
        over = self.held() + size - self.bound()
        if over > 0:
            for path, taken in self._removable():
                with suppress(OSError):
                    path.unlink()
                    over -= taken
                if over <= 0:
                    break
        if over > 0:
            return False
        durable.make_folder(part.parent)  # somebody may have emptied the cache
        part.touch()
        return True

    def _removable(self) -> list[tuple[Path, int]]:
        """List files that nobody uses, those first that were not used for longest."""
        found = []
        for place in sorted(self._all(), key=_last_use):
            for path, size in [] if self._used(place) else sorted(_files(place), reverse=True):
                if path.name.partition(".")[0] not in self.mine:
                    found.append((path, size))
        return found

    def _used(self, place: Path) -> bool:
        """Return whether another Room, of whatever process, uses a set."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self.claims):
                of = name.partition(".")[0]
                if of.startswith(f"use-{place.name}-") and of != self._use(place):
                    if held(self.claims, of):
                        return True
                    with claim(self.claims, of):  # takes a dead claim over, and removes it
                        pass
        return False

    def _all(self) -> list[Path]:
        """List the folders of all sets."""
        with suppress(FileNotFoundError):
            return [
                Path(entry.path)
                for entry in os.scandir(self.folder)
                if entry.is_dir() and entry.name != self.claims.name
            ]
        return []


def _files(place: Path) -> list[tuple[Path, int]]:
    """List a set's fetched and partial files, each with the bytes that it takes."""
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(place):
            if entry.name == USED:
                continue
            with suppress(FileNotFoundError, IndexError, ValueError):
                size = entry.stat().st_size
                if entry.name.endswith(PART):
                    size = int(entry.name.split(".")[-2])
                found.append((Path(entry.path), size))
    return found


def _last_use(place: Path) -> float:
    try:
        return (place / USED).stat().st_mtime
    except OSError:
        return 0.0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
