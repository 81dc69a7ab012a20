"""List the files of class folders, and compare the list with a manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cache.format.manifest import USABLE, Images, printable_paths
from pipeline.images.folders import DataFolder, class_folders
from pipeline.images.names import as_text, is_hidden, is_system_path, on_disk
from pipeline.images.patience import DataError, is_folder, listed, status
from pipeline.runtime.progress import Progress
from pipeline.runtime.wording import counted, same, some

# Threads that list folders on another machine's disk, where listing is mostly waiting.
# On a local disk they would only wait for each other.
LOOKERS = 16
# A disk counts as another machine's if listing takes more than FAR seconds a file,
# measured over the first TELLING files.
FAR, TELLING = 20e-6, 500


def list_files(
    data: DataFolder, known: Container[str] = (), *, every: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """List all files below the class folders, except hidden files and files that a
    system left.

    known: paths of a manifest, which are listed whoever left them. every: list the
    files that a system left, too. Returns str [n]
    paths relative to the folder, sorted, as ``names.as_text`` gives them; int32 [n]
    class indices; int64 [n] sizes in bytes, -1 for a link to nothing; int64 [n] times
    of the last change, in ns since 1970. Raises DataError for a class folder of no
    known class, and for a folder that can't be listed.
    """
    folder = data.path
    index = _indices(data)
    names = list(index)
    found: list[tuple[str, int, int, int]] = []

    def look(name: str) -> list[tuple[str, int, int, int]]:
        return [
            (path, index[name], size, changed)
            for path, size, changed in _walk(folder / on_disk(name), name)
            if every or not is_system_path(path.partition("/")[2]) or printable_paths(path) in known
        ]

    left = iter(names)
    with (
        Progress("looking for files", len(names), "class folders") as progress,
        ThreadPoolExecutor(LOOKERS) as pool,
    ):
        begun = time.perf_counter()
        for name in left:
            found += look(name)
            progress.advance(1)
            if len(found) >= TELLING:
                break
        far = time.perf_counter() - begun > FAR * len(found)
        try:
            for part in (pool.map if far else map)(look, left):
                found += part
                progress.advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if not found:
        raise DataError(f"the class folders of {folder} hold no files")
    found.sort()
    paths, indices, sizes, changed = zip(*found, strict=True)
    return (
        np.array(paths, object),
        np.array(indices, np.int32),
        np.array(sizes, np.int64),
        np.array(changed, np.int64),
    )


def has_system_files(data: DataFolder) -> bool:
    """Return whether systems left files among the images, which a manifest of a version
    up to 0.8 holds."""
    return len(list_files(data)[0]) < len(list_files(data, every=True)[0])


def _indices(data: DataFolder) -> dict[str, int]:
    """Return the class index of every class folder: name as ``as_text`` gives it →
    index. Raises DataError for a folder of no class."""
    index = {same(name): i for i, name in enumerate(data.class_names)}
    names = class_folders(data.path, data.class_names)
    if foreign := [name for name in names if same(name) not in index]:
        raise DataError(
            f"{data.path} has {counted(len(foreign), 'class folder')} of no known class "
            f"({some(foreign)}), where {counted(len(data.class_names), 'class', 'classes')} "
            f"({some(data.class_names)}) are known; pass the --class-map that names them, or take "
            f"the folders away"
        )
    return {name: index[same(name)] for name in names}


def _walk(folder: Path, relative: str) -> Iterator[tuple[str, int, int]]:
    """Yield (path, size, time of change) of every file below a folder. A link to a
    folder above itself is left out."""
    waiting: list[tuple[str, str, frozenset]] = [(str(folder), relative, frozenset())]
    while waiting:
        place, name, above = waiting.pop()
        about = status(place)
        if about is None:
            raise DataError(f"{place} is gone since it was listed; run the same command again")
        here = (about.st_dev, about.st_ino)
        if here in above:
            continue
        for entry in listed(place):
            if is_hidden(entry.name):
                continue
            path = f"{name}/{as_text(entry.name)}"
            if is_folder(entry):
                waiting.append((entry.path, path, above | {here}))
            elif (found := _status(entry)) is None:  # a symbolic link to nothing
                yield path, -1, 0
            else:
                yield path, found.st_size, found.st_mtime_ns


def _status(entry: os.DirEntry) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return status(entry.path)


def require_same_files(data: DataFolder, images: Images, made: str) -> None:
    """Raise DataError unless the folder holds exactly the files of the manifest, with
    the same sizes and classes.

    Paths that differ in Unicode normalisation only are the same, and files that a
    system left don't count. Contents are compared when files are read. made: the
    store's name in the message.
    """
    paths, class_index, sizes, _ = list_files(data, set(images.path.tolist()))
    images = images.take(np.flatnonzero(~_left_by_systems(images, paths)))
    paths = np.array([printable_paths(p) for p in paths], object)
    there = images.path
    if set(paths) != set(there):
        paths, there = (np.array([same(p) for p in several], object) for several in (paths, there))
    # Sorted again, since a name that isn't UTF-8 sorts elsewhere in its printable form.
    here, order = _order(paths), _order(there)
    paths, class_index, sizes = paths[here], class_index[here], sizes[here]
    if np.array_equal(paths, there[order]):
        changed = np.flatnonzero(
            (sizes != images.bytes[order]) & (images.status[order] == USABLE)
            | (class_index != images.class_index[order])
        )
        if len(changed) == 0:
            return
        one = changed[0]
        first, count, what = paths[one], len(changed), "of another size or class"
        if sizes[one] != images.bytes[order][one]:
            first = f"{first} ({images.bytes[order][one]} bytes then, {sizes[one]} now)"
    else:
        now, then = set(paths), set(there)
        missing, added = sorted(then - now), sorted(now - then)
        first, count, what = (
            (missing[0], len(missing), "missing") if missing else (added[0], len(added), "added")
        )
    raise DataError(
        f"{data.path} is not the data set that {made} was made from: {count} of {len(images)} "
        f"images {what}, the first is {first}; pass the folder it was made from, or generate a "
        "new store"
    )


def _left_by_systems(images: Images, paths: np.ndarray) -> np.ndarray:
    """Return the rows of unusable files that a system left, and that are gone: bool
    [images]."""
    here = set(paths.tolist())
    return np.array(
        [
            status != USABLE and path not in here and is_system_path(path.partition("/")[2])
            for path, status in zip(images.path, images.status, strict=True)
        ],
        bool,
    )


def _order(paths: np.ndarray) -> np.ndarray:
    """Return the rows in the order of their paths. Python sorts strings twice as fast
    as numpy does."""
    return np.array(sorted(range(len(paths)), key=paths.tolist().__getitem__), np.int64)
