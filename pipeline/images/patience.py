"""Read folders and files of disks that fail for a moment: try again, then stop with a
line that names the file. An error of reading never makes an image unusable."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cache.errors import MealError, momentary

T = TypeVar("T")
# Seconds between tries. A file handle of NFS that has gone stale is fresh at the second
# try; a server that restarts needs longer.
WAITS = (0.1, 0.5, 2.0)


class DataError(MealError):
    """A data set that is missing, can't be read, isn't laid out as expected, or isn't
    the data set that a store was made from."""


def patiently(read: Callable[[], T], path: str | Path) -> T:
    """Return ``read()``, and try again after an error that may pass.

    Raises DataError, which names ``path``, if the error stays; and OSError at once for
    an error that doesn't pass by waiting (``cache.errors.LASTING``: no such file).
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not momentary(error):
                raise
            if wait is None:
                why = getattr(error, "strerror", None) or error or type(error).__name__
                raise DataError(
                    f"{path} can't be read now ({why}; {len(WAITS) + 1} tries); mend the disk or "
                    f"the permission, or take it out of the folder, and run the same command again"
                ) from None
            time.sleep(wait)
    raise AssertionError


def read_file(path: str | Path) -> bytes:
    """Read a file whole, patiently. Raises DataError if the file can't be read now or
    is still growing, and OSError if there is no such file."""
    return patiently(lambda: _read(path), path)


def _read(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        content = file.read()
        size = os.fstat(file.fileno()).st_size
    if len(content) < size:  # some file systems say 0 for a file that they make up
        raise OSError(errno.EIO, f"only {len(content):,} of {size:,} bytes came")
    return content


def listed(folder: str | Path) -> list[os.DirEntry]:
    """List a folder whole, patiently. Raises DataError if the folder can't be listed
    now, and OSError if there is no such folder."""

    def read() -> list[os.DirEntry]:
        with os.scandir(folder) as entries:
            return list(entries)

    return patiently(read, folder)


def glimpsed(folder: str | Path, enough: Callable[[os.DirEntry], bool]) -> list[os.DirEntry]:
    """List a folder as far as the first entry that is enough, patiently. A folder may
    hold a million files. Raises as ``listed`` does."""

    def read() -> list[os.DirEntry]:
        seen = []
        with os.scandir(folder) as entries:
            for entry in entries:
                seen.append(entry)
                if enough(entry):
                    break
        return seen

    return patiently(read, folder)


def status(path: str | Path) -> os.stat_result | None:
    """Return the status of the file that a path leads to, patiently; None for a link
    that leads nowhere, or in a circle. Raises DataError if the disk doesn't tell
    now."""
    try:
        return patiently(lambda: os.stat(path), path)
    except OSError:
        return None


def is_file(path: str | Path) -> bool:
    """Return whether a path leads to an ordinary file. Raises DataError if the disk
    doesn't tell now."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_there(folder: str | Path) -> bool:
    """Return whether a path leads to a folder. Raises DataError if the disk doesn't
    tell now."""
    found = status(folder)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder, or a link to a folder. Raises DataError if
    the disk doesn't tell now."""
    try:
        return entry.is_dir()  # needs no disk access, except for a symbolic link
    except OSError as error:
        if not momentary(error):  # a link to itself
            return False
    return is_there(entry.path)
