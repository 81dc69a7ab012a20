"""Hold files open that are read again and again, each at many places."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path

from pipeline.images.patience import patiently

OPEN = 256  # files that are held open at once, of 1,024 that a system commonly allows


class _Open:
    """An open file, which is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """Holds the most recently used files open. Threads may share it."""

    def __init__(self, most: int = OPEN) -> None:
        self.most, self.lock = most, threading.Lock()
        self.held: OrderedDict[Path, _Open] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Read bytes at an offset, patiently. Raises DataError if the disk fails now,
        or if the file is shorter."""
        return patiently(lambda: self._read(path, offset, size), path)

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        file, found = self._open(path), b""
        try:
            while len(found) < size:
                part = os.pread(file.descriptor, size - len(found), offset + len(found))
                if not part:
                    break
                found = found + part if found else part
        except OSError:
            self.forget(path)  # a file handle of NFS may have gone stale
            raise
        if len(found) < size:
            self.forget(path)
            raise OSError(errno.EIO, f"only {len(found):,} of {size:,} bytes came")
        return found

    def _open(self, path: Path) -> _Open:
        with self.lock:
            if path in self.held:
                self.held.move_to_end(path)
                return self.held[path]
        file = _Open(path)
        with self.lock:
            self.held[path] = file
            while len(self.held) > self.most:
                self.held.popitem(last=False)
        return file

    def forget(self, path: Path) -> None:
        """Open a file anew when it is read next."""
        with self.lock:
            self.held.pop(path, None)
