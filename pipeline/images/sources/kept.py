"""Keep what was read of a data set's files in the user's cache folder, so that the next
start doesn't read it again."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cache.system import durable
from cache.system.claims import claim, held
from cache.system.folders import VARIABLE, cache_folder
from cache.system.signals import check
from pipeline.runtime.progress import say

VERSION = "2"  # of the kept files


def file_for(kind: str, *about: str) -> Path:
    """Return the place of kept arrays. about: everything that they depend on, apart
    from what is compared after reading them."""
    digest = hashlib.sha256("\0".join((VERSION, kind, *about)).encode("utf-8", "surrogateescape"))
    return cache_folder() / kind / f"{digest.hexdigest()[:32]}.npz"


def kept(file: Path) -> dict[str, np.ndarray] | None:
    """Read kept arrays; None if there are none, or if the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as columns:
            return {name: columns[name] for name in columns.files}
    except Exception:  # no file, or a damaged file, which can raise anything
        return None


def once(file: Path, there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Let one process of this cache ``make`` a file, and return when it is ``there``.
    The others wait; if that process dies, another makes the file. Without a cache that
    can be written every process makes its own."""
    begun = False
    try:
        durable.make_folder(file.parent)
        while not there():
            with claim(file.parent / "claims", file.name) as mine:
                if mine and not there():
                    begun = True
                    make()
                    return
            while not there() and held(file.parent / "claims", file.name):
                time.sleep(0.2)
                check()
    except OSError as error:
        if begun:  # an error of the work itself
            raise
        say(
            f"nothing can be kept in {file.parent} ({error.strerror or error}), so every start "
            f"reads the data's headers; name another folder in the variable {VARIABLE}"
        )
        make()


def keep(file: Path, columns: dict[str, np.ndarray]) -> None:
    """Keep arrays. A disk that doesn't take them doesn't stop the work."""
    with suppress(OSError):
        write(file, columns)


def write(file: Path, columns: dict[str, np.ndarray]) -> None:
    """Write arrays. Raises OSError."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **columns)
    durable.make_folder(file.parent)
    durable.replace_file(file, content.getvalue())


def packed(texts: Sequence[str]) -> np.ndarray:
    """Pack texts into one array, uint8 [bytes]. No text holds a NUL."""
    joined = "".join(f"{text}\0" for text in texts)
    return np.frombuffer(joined.encode("utf-8", "surrogateescape"), np.uint8)


def unpacked(column: np.ndarray) -> np.ndarray:
    """Return packed texts: str [n], object."""
    texts = column.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    found = np.empty(len(texts), object)
    found[:] = texts
    return found
