"""Match class folders with the classes that others know; refuse folders that aren't
class folders, and results that would lie among images."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cache.format.manifest import Images
from pipeline.images.folders import DataFolder, broken_links, class_folders, left_out
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
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted, same, some

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
    if broken := broken_links(data.path):
        raise DataError(
            f"{data.path / broken[0]} is a link that leads nowhere, and would be missing as a "
            f"class; mount the disk that it leads to, or remove the link"
        )
    if len(names) == 1:
        without = "" if _look_into(data.path / on_disk(names[0]))[1] else ", without images"
        raise DataError(
            f"{data.path} has one class folder only ({names[0]}{without}), and of one class there "
            f"is nothing to learn or to tell; pass as --data the folder that holds one folder per "
            f"class, or all classes' names as a --class-map"
        )
    if left := left_out(data.path):
        say(
            f"{data.path}: left out {some(left, 10)}, which {_are(left)} hidden or made by a system"
        )
    if names != (numbered := sorted(names, key=natural)):
        i = next(i for i, (a, b) in enumerate(zip(names, numbered, strict=True)) if a != b)
        say(
            f"the classes of {data.path} have the order of their names as text, so class {i} is "
            f"{names[i]} and not {numbered[i]}; for another order pass a --class-map"
        )
    alike: dict[str, str] = {}
    for name in names:
        if other := alike.get(name.casefold().strip()):
            say(f"{data.path}: {other!r} and {name!r} are two classes")
        alike[name.casefold().strip()] = name


def say_depth(data: DataFolder, paths: Collection[str]) -> None:
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
            f"{data.path}: {counted(len(several), 'class', 'classes')} with images in several "
            f"folders, which all count ({some(several[0])})"
        )


def map_classes(data: DataFolder, names: Sequence[str] | None, owner: str) -> DataFolder:
    """Map class folders by name to the classes that a model knows.

    names: the model's classes in the order of its outputs; None if they aren't known.
    owner: what knows them, for messages. The folders may be some of the classes, in any
    order. A class map of the user's stays: it may give classes other names, but none of
    the model's names another place. Raises DataError for class folders that have no
    name there.
    """
    if names is None:
        return data
    if [same(n) for n in names] == [same(n) for n in data.class_names]:
        return replace(data, mapped=True)
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
    """Raise DataError if class folders hold folders and no images, or if the names of
    those that hold images tell no classes. names: of the folders; None: of all."""
    names = class_folders(data.path) if names is None else names
    found = {name: _look_into(data.path / on_disk(name)) for name in names}
    if nested := [name for name, (nested, _) in found.items() if nested]:
        raise DataError(_refusal(data, nested))
    holding = [name for name, (_, images) in found.items() if images]
    if holding and _tell_no_classes(holding):
        raise DataError(
            f"{data.path} has no class folders: {some(holding)} {_are(holding)} named like "
            f"splits or kinds of files, and hold{'s' * (len(holding) == 1)} images; sort the "
            f"images into a folder per class, or pass the folders' names as a --class-map if they "
            f"are classes"
        )


def _tell_no_classes(names: Sequence[str]) -> bool:
    splits = {split_within(name) for name in names}
    return all(map(tells_no_class, names)) or (len(splits) > 1 and None not in splits)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


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
    if not inner or is_beside(folder.name) or _tell_no_classes(names):
        return False
    seen = [_look_into(Path(one)) for one in inner[:3]]
    return any(images for _, images in seen) and not any(nested for nested, _ in seen)


def _siblings(folder: Path) -> list[Path]:
    return sorted(Path(e.path) for e in listed(folder.parent) if is_folder(e))


def require_outside(option: str, path: Path | None, folders: Iterable[Path]) -> None:
    """Raise DataError if a result would be written among class folders, where it would
    be a class or an image at the next start. A hidden name is never looked at.

    option: the option that names the result. path: of the result, which need not exist.
    folders: those that hold class folders. A class folder may be a link to a folder
    elsewhere, where a result would be an image too.
    """
    if path is None:
        return
    place = Path(os.path.realpath(path))
    for folder in (one for top in folders for one in (top, *_linked(top))):
        root = Path(os.path.realpath(folder))
        if place == root or (
            root in place.parents and not any(map(is_hidden, place.relative_to(root).parts))
        ):
            raise DataError(
                f"{option} {path} lies in {folder}, among the class folders, and would be taken "
                f"for one of them; choose a place outside of it"
            )


def _linked(folder: Path) -> list[Path]:
    """Return the links to folders in a folder; none if there is no such folder yet."""
    try:
        return [Path(e.path) for e in listed(folder) if e.is_symlink() and is_folder(e)]
    except OSError:
        return []


def require_no_split(option: str, path: Path | None, data: DataFolder) -> None:
    """Raise DataError if a result that doesn't exist yet would be written in train/ or
    val/ of the folder that the user named, or as one of them. Training would take the
    result's folders for class folders."""
    if path is not None and data.root not in (None, data.path) and not path.exists():
        require_outside(option, path, [data.root / split for split in ("train", "val")])


def require_elsewhere(option: str, path: Path, images: Images | Sequence[str]) -> None:
    """Raise DataError if a result would be written among the images of a manifest
    (``require_outside``), wherever they lie. images: the manifest, or its paths."""
    paths = images.path[images.usable].tolist() if isinstance(images, Images) else list(images)
    probes = paths[:: max(1, len(paths) // PROBES)][:PROBES]
    place = Path(os.path.realpath(path))
    for root in (place, *place.parents):
        if any((root / on_disk(probe)).is_file() for probe in probes):
            require_outside(option, path, [root])
