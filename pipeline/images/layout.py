"""Match class folders with the classes that others know; refuse folders that aren't
class folders, and results that would lie among images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cache.format.manifest import Images
from pipeline.images.folders import DataFolder, class_folders, flat, system_folders
from pipeline.images.names import (
    counted,
    is_hidden,
    is_system_folder,
    may_be_image,
    natural,
    on_disk,
    same,
    some,
    split_of,
)
from pipeline.images.patience import DataError, is_folder, listed
from pipeline.runtime.progress import say

DEEPEST = 4  # folders between --data and the split that was probably meant
MOST = 200  # folders that are looked at to find it
PROBES = 3  # images by which a manifest's folder is known


def require_class_folders(data: DataFolder) -> None:
    """Require that the folders that give classes their names hold images, and print
    what a user should know of them.

    A folder of folders is a split under another name, or a folder of classes: one
    label for everything below it would be wrong. A class folder may keep its images in
    one folder of its own (CLASS/images/…). Names that a class map, a store or a model
    gave aren't doubted. Raises DataError.
    """
    if data.mapped:
        return
    names = class_folders(data.path)
    require_images(data, names)
    if left := system_folders(data.path):
        say(f"{data.path}: left out {some(left, 10)}, which systems make and no classes")
    if names != (numbered := sorted(names, key=natural)):
        i = next(i for i, (a, b) in enumerate(zip(names, numbered, strict=True)) if a != b)
        say(
            f"the classes of {data.path} have the order of their names as text, so class {i} is "
            f"{names[i]} and not {numbered[i]}; for another order pass a --class-map"
        )


def map_classes(data: DataFolder, names: Sequence[str] | None, owner: str) -> DataFolder:
    """Map class folders by name to the classes that a model knows.

    names: the model's classes in the order of its outputs; None if they aren't known.
    owner: what knows them, for messages. The folders may be some of the classes, in any
    order. A class map of the user's stays: it may give classes other names, but none of
    the model's names another place. Raises DataError for class folders that have no
    name there.
    """
    if names is None or [same(n) for n in names] == [same(n) for n in data.class_names]:
        return data
    place = {same(name): i for i, name in enumerate(names)}
    if data.mapped:
        _require_no_contradiction(data, place, owner)
        return data
    folders = class_folders(data.path, names)
    if foreign := [name for name in folders if same(name) not in place]:
        require_images(data, foreign)
        raise DataError(
            f"{data.path} has {counted(len(foreign), 'class folder')} ({some(foreign)}) of no "
            f"class of {owner}, whose {len(names)} classes are {some(names)}; pass images of these "
            f"classes, or as --class-map a file that lists them in this order under the folders' "
            f"names"
        )
    say(
        f"{data.path} has folders of {len(folders)} of the {len(names)} classes of {owner}"
        if len(names) > len(folders)
        else f"the classes of {data.path} have the order of {owner}, not that of their names"
    )
    return replace(data, class_names=list(names), mapped=True)


def _require_no_contradiction(data: DataFolder, place: dict[str, int], owner: str) -> None:
    for i, name in enumerate(data.class_names):
        if place.get(same(name), i) != i:
            raise DataError(
                f"the class map says that class {i} is {name}, which is class {place[same(name)]} "
                f"of {owner}; pass the class map of these classes, or leave it out: class folders "
                f"are then found by name"
            )


def require_images(data: DataFolder, names: Sequence[str] | None = None) -> None:
    """Raise DataError if class folders hold folders and no images, or are splits that
    hold images. names: of the folders; None: of all."""
    names = class_folders(data.path) if names is None else names
    if all(map(split_of, names)) and all(flat(data.path / on_disk(name)) for name in names):
        raise DataError(
            f"{data.path} has no class folders: {some(names)} {'is' if len(names) == 1 else 'are'} "
            f"named like {'a split' if len(names) == 1 else 'splits'} and "
            f"hold{'s' if len(names) == 1 else ''} images; sort the images into a folder per "
            f"class, or pass the folders' names as a --class-map if they are classes"
        )
    if nested := [name for name in names if _is_nested(data.path / on_disk(name))]:
        raise DataError(_refusal(data, nested))


def _is_nested(folder: Path) -> bool:
    """Return whether a folder holds folders and no images, other than a chain of single
    folders down to images."""
    first = folder
    while True:
        entries = [entry for entry in listed(folder) if not is_hidden(entry.name)]
        inner = [e.path for e in entries if not is_system_folder(e.name) and is_folder(e)]
        folders = set(inner)
        if not inner or any(may_be_image(e.name) for e in entries if e.path not in folders):
            # Images at last: only a split keeps its images deeper than itself.
            return folder != first and split_of(first.name) is not None
        if len(inner) > 1 or len(str(folder)) > 4000:
            return True
        folder = Path(inner[0])


def _refusal(data: DataFolder, nested: Sequence[str]) -> str:
    several = len(nested) > 1
    line = (
        f"{data.path} has {len(nested)} folder{'s' * several} that "
        f"hold{'' if several else 's'} folders and no images ({some(nested)}), so "
        f"{'they are no classes' if several else 'it is no class'}"
    )
    wanted = split_of(data.split) or "train"
    if meant := _probably(data.path, wanted):
        if meant.name == data.split and meant.parent != data.path:
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
                    if split_of(one.name) == split:
                        return one
                    holders.append(one)
                deeper.append(one)
        waiting = deeper
    return holders[0] if len(holders) == 1 else None


def _holds_classes(folder: Path) -> bool:
    """Return whether a folder's folders hold images, as far as the first ones tell."""
    entries = [e for e in listed(folder) if not is_hidden(e.name) and not is_system_folder(e.name)]
    inner = [e for e in entries if is_folder(e)]
    return bool(inner) and any(
        may_be_image(e.name) and not is_folder(e) for one in inner[:3] for e in listed(one.path)
    )


def _siblings(folder: Path) -> list[Path]:
    return sorted(Path(e.path) for e in listed(folder.parent) if is_folder(e))


def require_outside(option: str, path: Path | None, folders: Iterable[Path]) -> None:
    """Raise DataError if a result would be written among class folders, where it would
    be a class or an image at the next start. A hidden name is never looked at.

    option: the option that names the result. path: of the result, which need not exist.
    folders: those that hold class folders.
    """
    if path is None:
        return
    place = Path(os.path.realpath(path))
    for folder in folders:
        root = Path(os.path.realpath(folder))
        if place == root or (
            root in place.parents and not any(map(is_hidden, place.relative_to(root).parts))
        ):
            raise DataError(
                f"{option} {path} lies in {folder}, among the class folders, and would be taken "
                f"for one of them; choose a place outside of it"
            )


def require_elsewhere(option: str, path: Path, images: Images | Sequence[str]) -> None:
    """Raise DataError if a result would be written among the images of a manifest
    (``require_outside``), wherever they lie. images: the manifest, or its paths."""
    paths = images.path[images.usable].tolist() if isinstance(images, Images) else list(images)
    probes = paths[:: max(1, len(paths) // PROBES)][:PROBES]
    place = Path(os.path.realpath(path))
    for root in (place, *place.parents):
        if any((root / on_disk(probe)).is_file() for probe in probes):
            require_outside(option, path, [root])
