"""Errors that a user can repair, and which errors of the operating system mean that a
file is damaged."""

from __future__ import annotations

import errno
from pathlib import Path


def printable(text: str) -> str:
    """The text with what isn't printable written as an escape: names of files may hold
    line breaks and codes that a terminal obeys."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


class MealError(Exception):
    """Something a user can mend. The message is one line: what, the value, the
    repair."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StoreError(MealError):
    """A label store that is missing, damaged, unfinished, or made from something else
    than what it is used with."""


class DamagedStore(StoreError):
    """A store whose own description (a zarr.json, the manifest) is not what was
    written. ``generate-labels`` can make that anew.

    file: which, relative to the store. fault: what is wrong with it; by default the
    message.
    """

    def __init__(self, message: str, file: str = "zarr.json", fault: str | None = None) -> None:
        super().__init__(message)
        self.file, self.fault = file, fault or message


class UnreadableStore(StoreError):
    """What can't be read for the moment, for want of memory or permission or of a disk
    that answers: no reason to call it damaged."""


# what no waiting mends
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def momentary(error: BaseException) -> bool:
    """Whether an error of reading tells nothing of what is there."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None and error.errno not in LASTING
    )


def unreadable(path: Path, file: object, error: BaseException) -> UnreadableStore:
    why = " ".join(str(error).split())[:160] or type(error).__name__
    return UnreadableStore(
        f"{file} of {path} can't be read now ({why}); mend that, or remove the file if it stays "
        f"so, and run the same command again"
    )


def damaged(path: Path, file: str, why: str) -> DamagedStore:
    fault = f"not what was written there ({' '.join(why.split())[:160]})"
    return DamagedStore(
        f"{path} is damaged: {file} is {fault}; run the command that made the store "
        "(generate-labels, merge or import-labels) again, which makes the file anew, or restore "
        "it from a copy",
        file,
        f"{fault}; without it nothing can be told of the labels",
    )


class BusyStore(StoreError):
    """Another process is doing what only one can do at a time."""
