"""Class folders on a disk: splits, class names and lists of files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.errors import MealError
from cache.format.manifest import USABLE, Images, printable_paths
from pipeline.runtime.progress import Progress

# Threads that list folders on another machine's disk, where listing is mostly waiting.
# On a local disk they would only wait for each other.
LOOKERS = 16
# A disk counts as another machine's if listing takes more than FAR seconds a file,
# measured over the first TELLING files.
FAR, TELLING = 20e-6, 500


class DataError(MealError):
    """A data set that is missing, isn't laid out as expected, or isn't the data set
    that a store was made from."""


@dataclass(frozen=True)
class DataFolder:
    """The class folders of one split, and the names of their classes.

    path: the folder that holds the class folders. class_names: in the order of the
    models' outputs, so that a name's place is its class index. mapped: True if a class
    map gave the names; otherwise they are the folders' names, sorted. root: the folder
    that the user named, which may hold several splits.
    """

    path: Path
    class_names: Sequence[str]
    mapped: bool = False
    root: Path | None = None

    @classmethod
    def find(
        cls, data: str | Path, split: str, class_map: Sequence[str] | None = None
    ) -> DataFolder:
        """Find the class folders of a split, in DATA/SPLIT, or in DATA if it isn't
        divided into splits. Raises DataError."""
        path = split_folder(data, split)
        return cls(path, class_map or class_names(path), class_map is not None, Path(data))


def split_folder(data: str | Path, split: str) -> Path:
    """Return the folder that holds the class folders: DATA/SPLIT if there is one, or
    DATA itself if it isn't divided into splits. Raises DataError."""
    data = Path(data)
    if not split or "/" in split or split in (".", ".."):
        raise DataError(
            f"--split is {split!r}; it must be the name of a folder of --data, like train"
        )
    if not data.is_dir():
        raise DataError(
            f"there is no folder {data}; --data must name a folder of class folders, or one with "
            f"train/ and val/"
        )
    splits = [name for name in dict.fromkeys((split, "train", "val")) if is_split(data, name)]
    if split in splits:
        return data / split
    if splits:
        raise DataError(
            f"{data} has {' and '.join(splits)} but no {split}; name another --split, or add the "
            f"folder"
        )
    return data


def is_split(data: str | Path, name: str) -> bool:
    """Tell whether DATA/NAME is a split, which holds class folders. A class that
    happens to be called train holds images instead."""
    folder = Path(data, name)
    return folder.is_dir() and any(_is_folder(entry) for entry in os.scandir(folder))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()  # needs no disk access, except for a symbolic link
    except OSError:  # a link to itself
        return False


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; a name's place is its class index.
    Raises DataError."""
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if _is_folder(entry) and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(
            f"{folder} has no class folders; it must hold one folder per class, with the images in "
            f"them"
        )
    return names


def read_class_map(path: str | Path) -> list[str]:
    """Read a class map: a text file with the name of one class folder a line. A name's
    line number, from 0, is its class index. Raises DataError."""
    try:
        names = [
            line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--class-map {path} can't be read ({error}); it must be imagenet-1k or a text file "
            f"with one folder name a line"
        ) from None
    if len(set(names)) != len(names) or not names:
        raise DataError(f"--class-map {path} must hold every class folder's name once, one a line")
    return names


def list_files(data: DataFolder) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """List all files below the class folders, except hidden files.

    Returns str [n] paths relative to the folder, sorted; int32 [n] class indices; int64
    [n] sizes in bytes; int64 [n] times of the last change, in ns since 1970. Raises
    DataError for a class folder of no known class.
    """
    folder, classes = data.path, data.class_names
    index = {name: i for i, name in enumerate(classes)}
    names = class_names(folder)
    for name in names:
        if name not in index:
            raise DataError(
                f"class folder {name} of {folder} is not among the {len(classes)} classes "
                f"({classes[0]}, {classes[1 % len(classes)]}, …); "
                "pass the --class-map that names it, or take the folder away"
            )

    def look(name: str) -> list[tuple[str, int, int, int]]:
        files = _walk(folder / name, name)
        return [(path, index[name], size, changed) for path, size, changed in files]

    found: list[tuple[str, int, int, int]] = []
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


def _walk(folder: Path, relative: str) -> Iterator[tuple[str, int, int]]:
    """Yield (path, size, time of change) of every file below a folder. A link to a
    folder above itself is left out."""
    waiting: list[tuple[str, str, frozenset]] = [(str(folder), relative, frozenset())]
    while waiting:
        place, name, above = waiting.pop()
        about = os.stat(place)
        here = (about.st_dev, about.st_ino)
        if here in above:
            continue
        for entry in os.scandir(place):
            if entry.name.startswith("."):
                continue
            path = f"{name}/{entry.name}"
            if _is_folder(entry):
                waiting.append((entry.path, path, above | {here}))
            else:
                try:
                    status = entry.stat()
                except OSError:  # a symbolic link to nothing
                    yield path, -1, 0
                else:
                    yield path, status.st_size, status.st_mtime_ns


def require_same_files(data: DataFolder, images: Images, made: str) -> None:
    """Raise DataError unless the folder holds exactly the files of the manifest, with
    the same sizes and classes. Contents are compared when files are read. made: the
    store's name in the message."""
    paths, class_index, sizes, _ = list_files(data)
    paths = np.array([printable_paths(p) for p in paths], object)
    # Sorted again, since a name that isn't UTF-8 sorts elsewhere in its printable form.
    here = np.argsort(paths, kind="stable")
    paths, class_index, sizes = paths[here], class_index[here], sizes[here]
    order = images.by_path
    if np.array_equal(paths, images.path[order]):
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
        now, then = set(paths), set(images.path)
        missing, added = sorted(then - now), sorted(now - then)
        first, count, what = (
            (missing[0], len(missing), "missing") if missing else (added[0], len(added), "added")
        )
    raise DataError(
        f"{data.path} is not the data set that {made} was made from: {count} of {len(images)} "
        f"images {what}, the first is {first}; pass the folder it was made from, or generate a "
        "new store"
    )
