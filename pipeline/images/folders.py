"""Class folders on a disk: splits, class names, and class names that others know."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.images.names import as_text, is_hidden, is_system_folder, may_be_image, split_of
from pipeline.images.patience import DataError, is_folder, is_there, listed, status
from pipeline.runtime.wording import counted, same, told_apart


@dataclass(frozen=True)
class DataFolder:
    """The class folders of one split, and the names of their classes.

    path: the folder that holds the class folders. class_names: in the order of the
    models' outputs, so that a name's place is its class index. mapped: True if a class
    map, a store or a model gave the names; otherwise they are the folders' names,
    sorted. root: the folder that the user named, which may hold several splits. split:
    the split that the user asked for.
    """

    path: Path
    class_names: Sequence[str]
    mapped: bool = False
    root: Path | None = None
    split: str = "train"

    @classmethod
    def find(
        cls, data: str | Path, split: str, class_map: Sequence[str] | None = None
    ) -> DataFolder:
        """Find the class folders of a split, in DATA/SPLIT, or in DATA if it isn't
        divided into splits. Raises DataError."""
        path = split_folder(data, split)
        return cls(path, class_map or class_names(path), class_map is not None, Path(data), split)


def split_folder(data: str | Path, split: str) -> Path:
    """Return the folder that holds the class folders: DATA/SPLIT if there is one, or
    DATA itself if it isn't divided into splits. Raises DataError."""
    data = Path(data)
    if not split or "/" in split or split in (".", ".."):
        raise DataError(
            f"--split is {split!r}; it must be the name of a folder of --data, like train"
        )
    if not is_there(data):
        raise DataError(
            f"there is no folder {data}; --data must name a folder of class folders, or one with "
            f"train/ and val/"
        )
    splits = [name for name in dict.fromkeys((split, "train", "val")) if is_split(data, name)]
    if split in splits:
        return data / split
    if splits:
        if why := flat(data / split):
            raise DataError(f"{why}; sort them into a folder per class, or name another --split")
        if is_there(data / split):
            raise DataError(f"{data / split} holds no class folders; name another --split")
        near = [name for name in _folder_names(data) if name not in splits and split_of(name)]
        meant = [name for name in near if split_of(name) == split_of(split)] or near
        raise DataError(
            f"{data} has {' and '.join(splits)} but no {split}; name another --split"
            + (f", for example --split {meant[0]}" if meant else "")
            + ", or add the folder"
        )
    return data


def is_split(data: str | Path, name: str) -> bool:
    """Tell whether DATA/NAME is a split, which holds class folders. A class that
    happens to be called train holds images instead."""
    folder = Path(data, name)
    return is_there(folder) and any(_is_class_folder(entry) for entry in listed(folder))


def _is_class_folder(entry: os.DirEntry) -> bool:
    name = entry.name
    return not (is_hidden(name) or is_system_folder(name)) and is_folder(entry)


def flat(folder: Path) -> str | None:
    """Return what is wrong with a folder that holds images and no class folders, for a
    message; None for any other folder, or none."""
    if not is_there(folder):
        return None
    entries = listed(folder)
    if any(_is_class_folder(entry) for entry in entries):
        return None
    images = sum(may_be_image(entry.name) and not is_folder(entry) for entry in entries)
    return (
        f"{folder} holds {counted(images, 'file')} and no class folders, so nothing tells their "
        f"classes"
        if images
        else None
    )


def _folder_names(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, except hidden folders."""
    return sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if not is_hidden(entry.name) and is_folder(entry)
    )


def class_folders(folder: Path, known: Collection[str] = ()) -> list[str]:
    """Return the names of the class folders, sorted. Folders that a system left are
    none, unless they are ``known`` as classes. Raises DataError, also for two folders
    whose names look the same."""
    named = {same(name) for name in known}
    names = [
        name for name in _folder_names(folder) if not is_system_folder(name) or same(name) in named
    ]
    if not names:
        raise DataError(
            f"{flat(folder) or f'{folder} has no class folders'}; it must hold one folder per "
            f"class, with the images in them"
        )
    first: dict[str, str] = {}
    for name in names:
        if other := first.get(same(name)):
            raise DataError(
                f"{folder} has two folders of one class, whose names differ in Unicode "
                f"normalisation only ({' and '.join(told_apart(other, name))}); make them one"
            )
        first[same(name)] = name
    return names


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; a name's place is its class index.
    Raises DataError."""
    return class_folders(folder)


def left_out(folder: Path) -> list[str]:
    """Return the names of the folders beside the class folders that are no classes:
    hidden ones, and those that a system left."""
    return sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if (is_hidden(entry.name) or is_system_folder(entry.name)) and is_folder(entry)
    )


def broken_links(folder: Path) -> list[str]:
    """Return the names of the links beside the class folders that lead nowhere."""
    return sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if entry.is_symlink() and not is_hidden(entry.name) and status(entry.path) is None
    )


def read_class_map(path: str | Path) -> list[str]:
    """Read a class map: a text file with the name of one class folder a line.

    A name's place, from 0, is its class index. Empty lines and blanks at the ends of a
    line don't count. Raises DataError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--class-map {path} can't be read ({error}); it must be imagenet-1k or a text file "
            f"with one folder name a line"
        ) from None
    names = [line.strip() for line in text.split("\n") if line.strip()]
    seen: dict[str, str] = {}
    for name in names:
        if other := seen.get(same(name)):
            raise DataError(
                f"--class-map {path} must hold every class folder's name once, one a line; it "
                f"has {' and '.join(told_apart(other, name))}"
            )
        seen[same(name)] = name
    if not names:
        raise DataError(
            f"--class-map {path} is empty; it must hold every class folder's name once, one a line"
        )
    return names
