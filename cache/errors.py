"""Define the errors that a user can repair, and tell which errors of the operating
system mean that a file is damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

BESIDE = ".packs.json"  # ends the name of a file beside a copy of a shared store


def printable(text: str) -> str:
    """Return the text with every unprintable character written as an escape. Names of
    files may hold line breaks, and codes that a terminal obeys."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


class MealError(Exception):
    """An error that a user can repair. The message is one line: what is wrong, the
    value, the repair."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StoreError(MealError):
    """An error about a label store. The store is missing, damaged or unfinished, or was
    made from other inputs than those with which it is used."""


class DamagedStore(StoreError):
    """An error about a store's own description: a zarr.json or the manifest is not what
    was written. ``generate-labels`` can rebuild the description.

    file: the damaged file, relative to the store. fault: what is wrong with the file;
    by default the message.
    """

    def __init__(self, message: str, file: str = "zarr.json", fault: str | None = None) -> None:
        super().__init__(message)
        self.file, self.fault = file, fault or message


class UnreadableStore(StoreError):
    """An error about a file that can't be read for the moment, for want of memory, of
    permission, or of a disk that answers. The store is not called damaged."""


# numbers of errors that don't pass by waiting
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def momentary(error: BaseException) -> bool:
    """Return whether an error of reading says nothing about the file: a lack of memory,
    or an error number that is not in ``LASTING``."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None and error.errno not in LASTING
    )


def unreadable(path: Path, file: object, error: BaseException) -> UnreadableStore:
    """Return the error for a file of the store at ``path`` that can't be read for the
    moment."""
    why = " ".join(str(error).split())[:160] or type(error).__name__
    return UnreadableStore(
        f"{file} of {path} can't be read now ({why}); mend that, or remove the file if it stays "
        f"so, and run the same command again"
    )


def damaged(path: Path, file: str, why: str) -> DamagedStore:
    """Return the error for a file of a store's description that is not what was
    written."""
    fault = f"not what was written there ({' '.join(why.split())[:160]})"
    repair = (
        f"remove the folder {path.parent}, which is fetched again"
        if os.path.exists(path.parent / (path.name + BESIDE))
        else "run the command that made the store (generate-labels, merge or import-labels) again, "
        "which makes the file anew, or restore it from a copy"
    )
    return DamagedStore(
        f"{path} is damaged: {file} is {fault}; {repair}",
        file,
        f"{fault}; without it nothing can be told of the labels",
    )


class BusyStore(StoreError):
    """An error about a task that another process is doing, and that only one process
    may do at a time."""
