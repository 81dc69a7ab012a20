"""Reach the containers of a store: whole files in the cache, and parts of others."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from cache.system.claims import claim
from cache.system.signals import Stopped, asked
from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.container_files import ContainerFiles, read_at
from pipeline.images.sources.remote import store
from pipeline.images.sources.remote.fetch import Fetch
from pipeline.images.sources.remote.persistence import persistently
from pipeline.images.sources.remote.room import SIZE, Room, shown
from pipeline.images.sources.remote.store import Object
from pipeline.images.sources.remote.url import Url
from pipeline.runtime.progress import Progress, say

FETCHERS = 8  # files that are fetched at once
RANGE_READERS = 64  # threads that read parts of objects, which is mostly waiting
MOMENTS = 4  # files at most that are fetched at once to read their headers alone
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk without room
ROOM_PATIENCE = 30.0  # seconds to wait for the room of a file
MB = 10**6


class RemoteFiles(ContainerFiles):
    """The objects of a store, each fetched whole into the cache as far as they fit, in
    their order. Parts of the others are read from the store.

    objects: as they were listed. place: of the objects, for people.
    """

    def __init__(self, objects: Sequence[Object], place: Url) -> None:
        self.objects, self.place = [*objects], place
        self.names: list[Any] = [one.url for one in objects]
        self.parts: set[int] = set()  # files of which parts are read, for want of room
        self.whole_ones: set[int] = set()  # files that are known to be in the cache
        self.got = 0  # bytes that are here, of those that ``ready`` waits for
        self.planned = False
        self._begin()

    def _begin(self) -> None:
        """Make what belongs to this process alone."""
        self.moments = threading.Semaphore(1)  # files that are here for a moment
        self.counting = threading.Lock()
        self.process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        mine = ("room", "moments", "counting", "process")
        return {name: value for name, value in self.__dict__.items() if name not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @cached_property
    def room(self) -> Room:
        try:
            return Room(self.objects)
        except OSError as error:
            raise _unwritable(kept.cache_folder(), error) from None

    def describe(self, counted: str) -> str:
        return f"{counted} in {self.place}"

    @property
    def paths(self) -> list[PurePath]:
        return [one.url.plain for one in self.objects]

    def places(self) -> list[str]:
        return [f"{one.url.identity}\n{one.etag}" for one in self.objects]

    def about(self) -> np.ndarray:
        return np.array([(one.size, one.changed) for one in self.objects], np.int64).reshape(-1, 2)

    def readers(self, threads: int) -> int:
        return max(threads, RANGE_READERS) if self.parts else threads

    def ready(self) -> None:
        """Fetch all files that fit into the cache, several at a time, and wait for
        those that other processes fetch. Raises DataError."""
        self._plan()
        queue = deque(i for i in range(len(self)) if i not in self.parts and not self._here(i))
        if not queue:
            return
        left = threading.Event()
        total = sum(self.objects[i].size for i in queue)
        self.got, shown_yet = 0, 0

        def halted() -> bool:
            return left.is_set() or asked()

        def work() -> None:
            while not halted():
                try:
                    number = queue.popleft()
                except IndexError:
                    return
                if not self._get(number, halted):  # another process fetches it
                    queue.append(number)
                    left.wait(0.1)

        with (
            Progress("fetching", -(-total // MB), "MB") as progress,
            ThreadPoolExecutor(min(FETCHERS, len(queue))) as pool,
        ):
            workers = [pool.submit(work) for _ in range(min(FETCHERS, len(queue)))]
            try:
                pending = set(workers)
                while pending:
                    done, pending = wait(pending, 0.2, FIRST_EXCEPTION)
                    for worker in done:
                        worker.result()
                    progress.advance(max(0, self.got // MB - shown_yet))
                    shown_yet = max(shown_yet, self.got // MB)
            finally:
                left.set()

    def _plan(self) -> None:
        """Decide which files fit, and say it if some don't."""
        if self.planned:
            return
        self.planned = True
        sizes = np.array([one.size for one in self.objects], np.int64)
        room = self.room.free_for_mine()
        if sizes.sum() <= room:
            return
        # Headers of the others are read in files that are fetched for a moment.
        largest = max(1, int(sizes.max()))
        moments = min(MOMENTS, max(1, room // (8 * largest)))
        self.moments = threading.Semaphore(moments)
        fits = int(np.searchsorted(np.cumsum(sizes), room - moments * largest, side="right"))
        self.parts = {i for i in range(fits, len(sizes)) if not self._here(i)}
        if self.parts:
            say(
                f"{self.place}: {len(self):,} files of {shown(sizes.sum())} don't fit into the "
                f"cache ({shown(room)} for them in {self.room.folder}): "
                f"{len(self) - len(self.parts):,} of them are kept there, and images of the others "
                f"are read from the store one by one; to keep all, raise {SIZE}, or name a folder "
                f"on a larger disk in {kept.VARIABLE}"
            )

    def _here(self, number: int) -> bool:
        """Return whether a file is in the cache, whole."""
        if number in self.whole_ones:
            return True
        try:
            there = self.room.paths[number].stat().st_size == self.objects[number].size
        except OSError:
            return False
        if there:
            self.whole_ones.add(number)
        return there

    def _count(self, n: int) -> None:
        with self.counting:
            self.got += n

    def _get(self, number: int, halted: Callable[[], bool]) -> bool:
        """Fetch a file into the cache, unless there is no room. Returns False if
        another process fetches it now."""
        try:
            with claim(self.room.claims, self.room.paths[number].stem) as mine:
                if not mine:
                    return False
                self._get_mine(number, halted)
        except OSError as error:
            if error.errno not in FULL:
                raise _unwritable(self.room.folder, error) from None
            self._no_room(number, f"the disk is full ({error.strerror}) of")
        return True

    def _get_mine(self, number: int, halted: Callable[[], bool]) -> None:
        """Fetch a file that no other process may fetch now."""
        one, part = self.objects[number], self.room.part(number, self.objects[number].size)
        if self._here(number):
            self._count(one.size)
        elif not self.room.admit(part, one.size):
            self._no_room(number, f"others use the {shown(self.room.bound())} of")
        else:
            try:
                target = self.room.paths[number]
                Fetch(one, part, target, came=self._count, halted=halted).run()
            except OSError as error:
                if error.errno in FULL:
                    part.unlink(missing_ok=True)
                raise
            self.whole_ones.add(number)

    def _no_room(self, number: int, why: str) -> None:
        """Go on without a file. why: goes before the cache's folder."""
        with self.counting:
            first = not self.parts
            self.parts.add(number)
        if first:
            say(
                f"{why} {self.room.folder}, so images of what isn't there are read from the store "
                f"one by one; make room, or name another folder in {kept.VARIABLE}"
            )

    @contextmanager
    def whole(self, number: int) -> Iterator[Path]:
        one, path = self.objects[number], self.room.paths[number]
        while number not in self.parts and not self._here(number):
            if not self._get(number, asked):
                threading.Event().wait(0.1)
            if asked():
                raise Stopped("stopped while fetching")
        if self._here(number):
            yield path
            return
        with self.moments:
            part, mine = self.room.moment(number, one.size)
            self._await_room(part, one)
            try:
                Fetch(one, part, mine, halted=asked).run()
                yield mine
            except OSError as error:
                raise _unwritable(self.room.folder, error) from None
            finally:
                for left in (mine, part):
                    left.unlink(missing_ok=True)

    def _await_room(self, part: Path, one: Object) -> None:
        """Wait for the room of one file, which others may hold for a moment."""
        for _ in range(int(ROOM_PATIENCE / 0.5)):
            if self.room.admit(part, one.size):
                return
            if asked():
                raise Stopped("stopped while fetching")
            threading.Event().wait(0.5)
        raise DataError(
            f"{one.url} takes {shown(one.size)}, and {self.room.folder} has no room for it within "
            f"{shown(self.room.bound())}; raise {SIZE}, or name a folder on a larger disk in "
            f"{kept.VARIABLE}"
        )

    def read(self, number: int, offset: int, size: int) -> bytes:
        for _ in range(2):
            if number not in self.whole_ones:
                break
            try:
                return read_at(self.room.paths[number], offset, size)
            except FileNotFoundError:  # somebody has removed it
                self.whole_ones.discard(number)
                if number in self.parts:  # it was damaged
                    break
                with suppress(DataError):  # a cache that can't be written any more
                    self._get(number, asked)
        return self._part(number, offset, size)

    def again(self, number: int, offset: int, size: int) -> bytes | None:
        found = self._part(number, offset, size)
        whole = number in self.whole_ones
        if whole and found != self.read(number, offset, size) and self._give_up(number):
            with suppress(OSError):
                self.room.paths[number].unlink(missing_ok=True)
            say(
                f"{self.names[number]} is damaged in the cache, and was removed there; its images "
                f"are read from the store one by one until the next start"
            )
        return found

    def _give_up(self, number: int) -> bool:
        """Read parts of a file from now on. Returns whether no other thread, which
        found the same damage, has said so before."""
        with self.counting:
            first = number not in self.parts
            self.parts.add(number)
            self.whole_ones.discard(number)
        return first

    def _part(self, number: int, offset: int, size: int) -> bytes:
        one = self.objects[number]
        if os.getpid() != self.process:
            raise DataError(
                f"{one.url} is read from the store, which a forked process can't do; start a data "
                f"loader's workers with multiprocessing_context='spawn' (or 'forkserver')"
            )
        return persistently(partial(store.read, one, offset, size), one.url)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"files can't be fetched into {folder} ({error.strerror or error}); mend that, or name "
        f"another folder in the variable {kept.VARIABLE}"
    )
