"""Fetch an object whole: go on from a partial file, check the bytes, put the file into
its place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path

from cache.system import durable
from pipeline.images.sources.remote import digests, store
from pipeline.images.sources.remote.persistence import Patience, never
from pipeline.images.sources.remote.store import NoRanges, Object, RemoteError, read, stream
from pipeline.runtime.progress import say

OVERLAP = 1 << 16  # bytes by which a partial file is known if a store tells no tag


class Fetch:
    """Fetches one object.

    part: the partial file. target: the place of the whole file. came: called with each
    number of bytes that came, a negative number for bytes that are fetched again.
    """

    def __init__(
        self,
        one: Object,
        part: Path,
        target: Path,
        *,
        came: Callable[[int], object] = lambda n: None,
        halted: Callable[[], bool] = never,
    ) -> None:
        self.one, self.part, self.target, self.came = one, part, target, came
        self.halted, self.patience = halted, Patience(one.url, halted)
        self.farthest = 0  # bytes that came at most, which alone are progress

    def run(self) -> None:
        """Fetch the object. Raises RemoteError if it can't be fetched: then the partial
        file is kept, and the next run goes on with it. Raises OSError of the disk, and
        Stopped."""
        self._begin()
        self._complete()
        self._check()
        durable.sync_file(self.part)
        # Kept headers stay good if the file is removed and fetched again.
        changed = self.one.changed
        os.utime(self.part, ns=(changed, changed))
        os.replace(self.part, self.target)
        durable.sync_folder(self.target.parent)

    def _begin(self) -> None:
        """Drop a partial file that can't be gone on with."""
        at = self.part.stat().st_size if self.part.exists() else 0
        self.came(at)
        if not at:
            return
        checked = digests.kind_of(self.one.etag) != ""
        if at > self.one.size or (not checked and _older_than_this_boot(self.part)):
            return self._anew()
        if not (self.one.etag or self.one.changed):
            overlap = min(at, OVERLAP)
            with open(self.part, "rb") as file:
                file.seek(at - overlap)
                end = file.read()
            try:
                if self._overlap(at - overlap, overlap) != end:
                    self._anew()
            except NoRanges:
                self._anew()
        return None

    def _overlap(self, offset: int, size: int) -> bytes:
        while True:
            try:
                return read(self.one, offset, size)
            except RemoteError as error:
                self.patience.bear(error)

    def _anew(self) -> None:
        self.came(-self.part.stat().st_size)
        os.truncate(self.part, 0)

    def _complete(self) -> None:
        """Fetch what the partial file lacks, however often the connection breaks."""
        while (at := self.part.stat().st_size if self.part.exists() else 0) < self.one.size:
            begun = at
            try:
                with open(self.part, "ab", buffering=0) as file:
                    for chunk in stream(self.one, at, self.halted):
                        if self.patience.halted():  # a library's caller has left
                            break
                        at += len(chunk)
                        if at > self.one.size:
                            raise RemoteError(
                                f"{self.one.url}: more bytes came than the store says it has",
                                "more bytes came than the store says",
                                lasting=False,
                            )
                        _write(file, chunk)
                        self.came(len(chunk))
                        if at > self.farthest:
                            self.farthest = at
                            self.patience.renew()
                    else:
                        if at < self.one.size:
                            raise store.broken(self.one.url)
            except NoRanges:  # begun again behind the first bytes, here or by obstore
                self._anew()
                if not begun:
                    self.patience.bear(store.broken(self.one.url))
            except RemoteError as error:
                self.patience.bear(error)
        if not self.part.exists():  # an empty object
            self.part.touch()

    def _check(self) -> None:
        """Compare the file with the store's tag. If it differs, fetch it once more: a
        tag that isn't that of equal bytes which came twice is no digest, as of
        encrypted objects. That is remembered for the folder of the store."""
        kind = digests.kind_of(self.one.etag)
        no_digest = self.target.parent / f"{kind}-is-no-digest"
        if not kind or no_digest.exists() or digests.agrees(self.part, self.one.etag) is not False:
            return
        first = digests.sha256(self.part)
        self._anew()
        self.farthest = 0
        self._complete()
        if digests.agrees(self.part, self.one.etag):
            say(f"{self.one.url} came damaged, and was fetched once more")
            return
        if digests.sha256(self.part) != first:
            self._anew()
            raise RemoteError(
                f"{self.one.url} came twice, with other bytes each time, and neither has the "
                f"store's tag {self.one.etag}; mend the network or the proxy, and run the same "
                f"command again",
                "its bytes differ each time",
                lasting=True,
            )
        no_digest.touch()


def _write(file: RawIOBase, chunk: bytes) -> None:
    """Write bytes whole. A disk that fills up may take a part of them."""
    left = memoryview(chunk)
    while left:
        left = left[file.write(left) :]


def _older_than_this_boot(path: Path) -> bool:
    """Return whether a file was last written before the machine started: its end may
    then be zeros that were never written."""
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return path.stat().st_mtime < started
