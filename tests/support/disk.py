"""Simulate a disk that loses all data not forced to it when the power fails. A killed
process can't show a missing fsync, since the kernel keeps its writes.

A ``Disk`` watches a folder, and notes every fsync below it and every call that changes
a folder. The disk holds for certain the content of a file at the file's last fsync, and
the names in a folder at the folder's last fsync. Later contents and names may have
reached the disk or not, in any order. A ``Moment`` records the certain and the possible
ones, and ``Disk.rebuild`` makes a folder with one of the disk's possible contents.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

# A place in memory for thousands of small folders: a disk takes 2 ms to remove each.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
GONE = 0  # in place of an inode: the name does not exist
CHANGES = ("rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir")

Names = dict[str, int]  # the names in a folder: name → inode


@dataclass
class Moment:
    """The certain and the possible contents of the disk, just before a call."""

    call: str
    done: frozenset  # ``Disk.done`` at this moment
    names: dict[int, Names]  # folder → its names at its last fsync
    # folder → name → other inodes that the name may stand for, oldest first
    others: dict[int, dict[str, list[int]]]
    certain: dict[int, bytes]  # file → content at its last fsync
    # file → present content, if it isn't the certain content; the youngest file is last
    volatile: dict[int, bytes]
    folders: frozenset[int]


@dataclass
class Disk:
    """A disk that watches ``root``. Files that are there at the start have reached the
    disk."""

    root: Path
    # paths below root whose fsync does nothing, as if it were missing in the program
    forgets: Callable[[Path], bool] = lambda path: False
    # results that must never be lost from now on; the test adds them
    done: set = field(default_factory=set)
    # (call, path below root) in order: fsync, rename, …, and the entries of ``note``
    calls: list[tuple[str, str]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        # inode → an open descriptor, so that no later file gets the same inode
        self.held: dict[int, int] = {}
        self.names: dict[int, Names] = {}
        self.others: dict[int, dict[str, list[int]]] = {}
        self.certain: dict[int, bytes] = {}
        self.folders: set[int] = set()
        self.start = self._hold(self.root)
        for folder, _, _ in os.walk(self.root):
            names = self.names[self._hold(Path(folder))] = self._names(Path(folder))
            self.certain |= {
                inode: self._content(inode) for inode in names.values() if inode not in self.folders
            }

    def note(self, what: str, path: str = "") -> None:
        self.calls.append((what, path))

    @contextmanager
    def watch(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, self._changing(name, getattr(os, name)))
            for name in ("fsync", "fdatasync"):
                patch.setattr(os, name, self._fsync)
            yield self
            self.moment("the end")
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held.clear()

    def moment(self, call: str) -> None:
        """Record a moment at which the power may fail."""
        with self.lock:
            self._look()
            files = {
                inode
                for names in self.others.values()
                for several in names.values()
                for inode in several
            }
            files |= {inode for names in self.names.values() for inode in names.values()}
            files -= self.folders | {GONE}
            contents = {inode: self._content(inode) for inode in self.held if inode in files}
            self.moments.append(
                Moment(
                    call,
                    frozenset(self.done),
                    {folder: dict(names) for folder, names in self.names.items()},
                    {
                        folder: {name: list(several) for name, several in names.items()}
                        for folder, names in self.others.items()
                    },
                    dict(self.certain),
                    {
                        inode: content
                        for inode, content in contents.items()
                        if content != self.certain.get(inode)
                    },
                    frozenset(self.folders),
                )
            )

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.root) or self.forgets(path.relative_to(self.root)):
            return
        with self.lock:
            self.moment(f"fsync {path.relative_to(self.root)}")
            self.note("fsync", str(path.relative_to(self.root)))
            inode = self._hold(path, descriptor)
            if inode in self.folders:
                self.names[inode] = self._names(path)
                self.others[inode] = {}
            else:
                self.certain[inode] = self._content(inode)

    def _changing(self, name: str, real: Callable) -> Callable:
        def change(*given: object, **named: object) -> object:
            path = Path(os.fsdecode(given[1 if name in ("rename", "replace", "link") else 0]))
            if named.get("dir_fd") is not None:
                path = Path(os.readlink(f"/proc/self/fd/{named['dir_fd']}"), path)
            if not path.is_relative_to(self.root):
                return real(*given, **named)
            with self.lock:
                self._look()
                result = real(*given, **named)
                self.note(
                    {"replace": "rename", "remove": "unlink"}.get(name, name),
                    str(path.relative_to(self.root)),
                )
                self._look()
                return result

        return change

    def _look(self) -> None:
        """Note every name below the root that stands for another inode than at the last
        look."""
        folders = [(self.start, self.root)]
        while folders:
            folder, path = folders.pop()
            now, known, others = (
                self._names(path),
                self.names.setdefault(folder, {}),
                self.others.setdefault(folder, {}),
            )
            for name in now.keys() | known.keys() | others.keys():
                inode = now.get(name, GONE)
                several = others.get(name, [])
                if inode != (several[-1] if several else known.get(name, GONE)):
                    others[name] = [*(other for other in several if other != inode), inode]
            folders += [
                (inode, path / name) for name, inode in now.items() if inode in self.folders
            ]

    def _names(self, folder: Path) -> Names:
        found = {}
        with suppress(FileNotFoundError):  # removed meanwhile by another thread
            for name in os.listdir(folder):
                with suppress(FileNotFoundError):
                    found[name] = self._hold(folder / name)
        return found

    def _hold(self, path: Path, descriptor: int | None = None) -> int:
        status = os.stat(path) if descriptor is None else os.fstat(descriptor)
        if status.st_ino not in self.held:
            self.held[status.st_ino] = (
                os.open(path, os.O_RDONLY) if descriptor is None else os.dup(descriptor)
            )
            if stat.S_ISDIR(status.st_mode):
                self.folders.add(status.st_ino)
        return status.st_ino

    def _content(self, inode: int) -> bytes:
        return os.pread(self.held[inode], os.fstat(self.held[inode]).st_size, 0)

    def rebuild(
        self,
        moment: Moment,
        folder: Path,
        rng: np.random.Generator | None = None,
        luck: str = "random",
    ) -> Path:
        """Make ``folder`` with one of the contents that the disk may have.

        luck: "none", only the certain names and contents; "names", also all later
        names, but no later content of a file; "late", all names, and the contents of
        some of the youngest files, as if the disk wrote these first; "random", any part
        of the later names and contents.
        """
        young = (
            list(moment.volatile)[-int(rng.integers(1, len(moment.volatile) + 1)) :]
            if luck == "late" and moment.volatile
            else []
        )

        def pick(certain: int, others: list[int]) -> int:
            if luck == "none":
                return certain
            return others[-1] if luck in ("names", "late") else int(rng.choice([certain, *others]))

        def content(inode: int) -> bytes:
            if inode not in moment.volatile:
                return moment.certain[inode]
            now = moment.volatile[inode]
            if inode in young:
                return now
            if luck != "random":
                return moment.certain.get(inode, bytes(0 if luck == "none" else len(now)))
            cut = now[: int(rng.integers(len(now) + 1))]
            several = [
                b"",
                cut,
                bytes(len(now)),
                cut + bytes(len(now) - len(cut)),
                now,
                moment.certain.get(inode, b""),
            ]
            return several[rng.integers(len(several))]

        def put(inode: int, place: Path) -> None:
            place.mkdir()
            certain, others = moment.names.get(inode, {}), moment.others.get(inode, {})
            now = {
                name: pick(certain.get(name, GONE), others[name]) if name in others else known
                for name, known in certain.items()
            }
            now |= {
                name: pick(GONE, several) for name, several in others.items() if name not in certain
            }
            for name, child in _renames_are_whole(now, certain, others).items():
                if child in moment.folders:
                    put(child, place / name)
                else:
                    (place / name).write_bytes(content(child))

        put(self.start, folder)
        return folder


def _renames_are_whole(picked: Names, certain: Names, others: dict[str, list[int]]) -> Names:
    """Correct picked names so that no rename is done in part. File systems rename in
    one step: a file renamed within its folder has the old name or the new name, not
    both and not neither."""
    names: dict[int, list[str]] = {}
    for name in picked:
        for inode in {certain.get(name, GONE), *others.get(name, [])} - {GONE}:
            names.setdefault(inode, []).append(name)
    for inode, several in names.items():
        first = next((name for name in several if certain.get(name) == inode), None)
        last = next(
            (name for name in several if (others.get(name) or [certain.get(name)])[-1] == inode),
            None,
        )
        having = [name for name in several if picked[name] == inode]
        for name in having:
            if name != (last if last in having else having[0]):
                picked[name] = GONE if name == first else certain.get(name, GONE)
        if first and last and not having and picked[first] == GONE:
            picked[first] = inode
    return {name: inode for name, inode in picked.items() if inode != GONE}
