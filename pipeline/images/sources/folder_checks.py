"""Refuse folders that aren't class folders, and say what a user should know of those
that are."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.images.names import (
    is_beside,
    is_hidden,
    is_named_image,
    is_system_folder,
    may_be_image,
    natural,
    on_disk,
    split_of,
    split_within,
    tells_no_class,
)
from pipeline.images.patience import DataError, glimpsed, is_folder, listed
from pipeline.images.sources.folder_names import broken_links, class_folders, left_out
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted, some

DEEPEST = 4  # folders between --data and the split that was probably meant
MOST = 200  # folders that are looked at to find it


def require_class_folders(folder: Path, split: str) -> None:
    """Require that the folders that give classes their names hold images, and print
    what a user should know of them.

    A folder of folders is a split under another name, or a folder of classes: one
    label for everything below it would be wrong. A class folder may keep its images in
    one folder of its own (CLASS/images/…). split: that the user asked for. Raises
    DataError.
    """
    names = class_folders(folder)
    require_images(folder, split, names)
    if broken := broken_links(folder):
        raise DataError(
            f"{folder / broken[0]} is a link that leads nowhere, and would be missing as a "
            f"class; mount the disk that it leads to, or remove the link"
        )
    if len(names) == 1:
        without = "" if _look_into(folder / on_disk(names[0]))[1] else ", without images"
        raise DataError(
            f"{folder} has one class folder only ({names[0]}{without}), and of one class there "
            f"is nothing to learn or to tell; pass as --data the folder that holds one folder per "
            f"class, or all classes' names as a --class-map"
        )
    if left := left_out(folder):
        say(f"{folder}: left out {some(left, 10)}, which {_are(left)} hidden or made by a system")
    if names != (numbered := sorted(names, key=natural)):
        i = next(i for i, (a, b) in enumerate(zip(names, numbered, strict=True)) if a != b)
        say(
            f"the classes of {folder} have the order of their names as text, so class {i} is "
            f"{names[i]} and not {numbered[i]}; for another order pass a --class-map"
        )
    alike: dict[str, str] = {}
    for name in names:
        if other := alike.get(name.casefold().strip()):
            say(f"{folder}: {other!r} and {name!r} are two classes")
        alike[name.casefold().strip()] = name


def say_depth(folder: Path, paths: Collection[str]) -> None:
    """Print which folders in class folders count, if a class has images in several.

    They may be masks. paths: of the listed files, relative to the folder.
    """
    if not any(path.count("/") > 1 for path in paths):
        return
    folders: dict[str, list[str]] = {}
    for place in sorted({path.rpartition("/")[0] for path in paths if may_be_image(path)}):
        folders.setdefault(place.partition("/")[0], []).append(place)
    if several := [places for places in folders.values() if len(places) > 1]:
        say(
            f"{folder}: {counted(len(several), 'class', 'classes')} with images in several "
            f"folders, which all count ({some(several[0])})"
        )


def require_images(folder: Path, split: str, names: Collection[str] | None = None) -> None:
    """Raise DataError if class folders hold folders and no images, or if the names of
    those that hold images tell no classes. names: of the folders; None: of all."""
    names = class_folders(folder) if names is None else names
    found = {name: _look_into(folder / on_disk(name)) for name in names}
    if nested := [name for name, (nested, _) in found.items() if nested]:
        raise DataError(_refusal(folder, split, nested))
    holding = [name for name, (_, images) in found.items() if images]
    if holding and tell_no_classes(holding):
        raise DataError(
            f"{folder} has no class folders: {some(holding)} {_are(holding)} named like "
            f"splits or kinds of files, and hold{'s' * (len(holding) == 1)} images; sort the "
            f"images into a folder per class, or pass the folders' names as a --class-map if they "
            f"are classes"
        )


def tell_no_classes(names: Sequence[str]) -> bool:
    """Return whether folders' names are those of splits or of kinds of files."""
    splits = {split_within(name) for name in names}
    return all(map(tells_no_class, names)) or (len(splits) > 1 and None not in splits)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def holds_images(folder: Path) -> bool:
    """Return whether a folder, or a chain of single folders, leads to images."""
    return _look_into(folder)[1]


def _look_into(folder: Path) -> tuple[bool, bool]:
    """Return whether a folder holds folders and no images, other than a chain of single
    folders down to images; and whether it, or the chain, leads to files that are named
    like images."""
    first = folder
    while True:
        entries = [
            entry
            for entry in glimpsed(folder, lambda e: is_named_image(e.name) and not is_folder(e))
            if not is_hidden(entry.name) and not is_system_folder(entry.name)
        ]
        inner = [Path(entry.path) for entry in entries if is_folder(entry)]
        files = [entry.name for entry in entries if Path(entry.path) not in inner]
        images = any(map(is_named_image, files))
        if images or not inner or any(map(may_be_image, files)):
            # Only a split keeps its images deeper than itself.
            return images and folder != first and split_of(first.name) is not None, images
        if len(inner) > 1 or len(str(folder)) > 4000:
            return True, False
        folder = inner[0]


def _refusal(folder: Path, split: str, nested: Sequence[str]) -> str:
    several = len(nested) > 1
    line = (
        f"{folder} has {len(nested)} folder{'s' * several} that "
        f"hold{'' if several else 's'} folders and no images ({some(nested)}), so "
        f"{'they are no classes' if several else 'it is no class'}"
    )
    wanted = split_of(split) or "train"
    if meant := _probably(folder, wanted):
        if meant.name == split and meant.parent != folder:
            return f"{line}; pass --data {meant.parent}"
        other = None
        if wanted == "train" and split_of(meant.name):
            other = next((f for f in _siblings(meant) if split_of(f.name) == "val"), None)
        beside = f" (to validate, --val-data {other})" if other else ""
        return f"{line}; pass --data {meant}{beside}"
    return (
        f"{line}; put one folder per class into one folder, or, if each of these is a class "
        f"with everything below it, list the classes' names in a file and pass it as --class-map"
    )


def _probably(top: Path, split: str) -> Path | None:
    """Find the folder that was probably meant: the nearest one that is named like the
    split and holds class folders; otherwise the only one that holds class folders."""
    waiting, holders, looked = [top], [], 0
    for _ in range(DEEPEST):
        deeper: list[Path] = []
        for folder in waiting:
            looked += 1
            if looked > MOST:
                return None
            inner = [Path(e.path) for e in listed(folder) if not is_hidden(e.name) and is_folder(e)]
            for one in sorted(inner):
                if _holds_classes(one):
                    if split_within(one.name) == split:
                        return one
                    holders.append(one)
                deeper.append(one)
        waiting = deeper
    return holders[0] if len(holders) == 1 else None


def _holds_classes(folder: Path) -> bool:
    """Return whether a folder's folders hold images, as far as the first ones tell."""
    entries = [e for e in listed(folder) if not is_hidden(e.name) and not is_system_folder(e.name)]
    inner = sorted(e.path for e in entries if is_folder(e))
    names = [os.path.basename(path) for path in inner]
    if not inner or is_beside(folder.name) or tell_no_classes(names):
        return False
    seen = [_look_into(Path(one)) for one in inner[:3]]
    return any(images for _, images in seen) and not any(nested for nested, _ in seen)


def _siblings(folder: Path) -> list[Path]:
    return sorted(Path(e.path) for e in listed(folder.parent) if is_folder(e))
