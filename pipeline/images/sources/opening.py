"""Find out what --data is: class folders, tar or parquet files, a list, or a folder
without classes; and which part of it is the split."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cache.system.local import require_local
from pipeline.images.names import (
    as_text,
    is_hidden,
    is_named_image,
    is_system_folder,
    natural,
    split_of,
)
from pipeline.images.patience import DataError, glimpsed, is_file, is_folder, is_there, listed
from pipeline.images.sources.class_folders import ClassFolders
from pipeline.images.sources.container_files import LocalFiles
from pipeline.images.sources.flat_folder import FlatFolder
from pipeline.images.sources.folder_checks import holds_images, tell_no_classes
from pipeline.images.sources.image_list import LISTS, ImageList, lines_of
from pipeline.images.sources.parquet import PARQUET
from pipeline.images.sources.remote.opening import in_remote_split, open_list, open_url
from pipeline.images.sources.remote.url import Url, is_url
from pipeline.images.sources.shards import (
    CONTAINERS,
    PACKED,
    braces,
    of_split,
    open_containers,
    require_one_kind,
    split_among,
    tells_split,
)
from pipeline.images.sources.source import ImageSource
from pipeline.images.sources.tars import TAR
from pipeline.runtime.progress import say

KINDS = "a folder, tar files, parquet files or a list"
LOOKED = 20  # class folders that are looked into


def place_of(data: str | Path | Url) -> Path | Url:
    """Return what --data names: a path, or a URL. Raises NotLocal for a URL that images
    can't be fetched from, and DataError for a URL that is none."""
    if isinstance(data, Url):
        return data
    if is_url(data):
        return Url.parse(str(data))
    require_local(data, images=True)
    return Path(data)


def open_source(data: str | Path | Url, split: str) -> ImageSource:
    """Open the images of a split.

    data: a folder of class folders, of tar or parquet files, or of images; a folder
    that holds one of these for each split (DATA/train, DATA/val; or files whose names
    tell the split; or a list beside a folder of that name); a tar or parquet file; a
    list of images, or of tar or parquet files; or a pattern of such files, with braces
    ({000..127}) or wildcards; or the URL of tar or parquet files, of a pattern of them,
    or of a folder that holds them. A source that isn't divided into splits is every
    split. Raises DataError.
    """
    data = place_of(data)
    if not split or "/" in split or split in (".", ".."):
        raise DataError(
            f"--split is {split!r}; it must be the name of a folder of --data, like train"
        )
    if isinstance(data, Url):
        return open_url(data, split)
    if is_file(data):
        return _of_file(data, split)
    if not is_there(data):
        if files := _matching(data):
            return _of_files(data, files, split)
        raise DataError(
            f"there is no {'file' if data.suffix else 'folder'} {data}; --data must name a folder "
            f"of class folders, or one with train/ and val/, tar or parquet files, or a list"
        )
    if found := in_split(data, split):
        return found
    if others := [name for name in ("train", "val") if name != split and in_split(data, name)]:
        raise _no_split(data, split, others)
    source = _of_folder(data, split)
    for suffix in LISTS:
        if isinstance(source, ClassFolders) and is_file(data / f"{split}{suffix}"):
            say(
                f"{data / f'{split}{suffix}'} is not used, since {data} holds class folders; to "
                f"use it, pass it as --data"
            )
    return source


def in_split(data: Path | Url, name: str) -> ImageSource | None:
    """Open what a folder holds for a split: class folders, tar files, parquet files or
    images in DATA/NAME, the list DATA/NAME.csv, or files in DATA (or DATA/data) whose
    names tell the split. Returns None if it holds nothing for the split alone."""
    if isinstance(data, Url):
        return in_remote_split(data, name)
    if not is_there(data):
        return None
    folder = data / name
    if is_class_folder_split(data, name):
        return _of_folder(folder, name)
    found = _without_class_folders(data, name)
    # Otherwise DATA holds the classes themselves, whatever lies beside them.
    return found() if found and _only_splits(data) else None


def _without_class_folders(data: Path, name: str) -> Callable[[], ImageSource] | None:
    """Find a split that is no folder of class folders. Returns a function that opens
    it, or None."""
    folder = data / name
    for suffix in LISTS:
        if is_file(data / f"{name}{suffix}"):
            return partial(_of_file, data / f"{name}{suffix}", name)
    if is_there(folder):
        if shards := _shards(folder):
            return partial(_of_files, folder, shards, name)
        if _is_flat(folder):
            return partial(FlatFolder, folder)
    for place in (data, data / "data"):
        shards = _shards(place) if is_there(place) else []
        if shards and any(tells_split(file) for file in shards) and of_split(shards, name):
            return partial(_of_files, place, shards, name)
    return None


def is_class_folder_split(data: str | Path, name: str) -> bool:
    """Return whether DATA/NAME holds folders. A class that happens to be called train
    holds images instead."""
    folder = Path(data, name)
    return is_there(folder) and any(_may_be_class(entry) for entry in listed(folder))


def _may_be_class(entry: os.DirEntry) -> bool:
    name = entry.name
    return not (is_hidden(name) or is_system_folder(name)) and is_folder(entry)


def _classes_in(folder: Path) -> list[str]:
    return sorted(as_text(entry.name) for entry in listed(folder) if _may_be_class(entry))


def _is_flat(folder: Path) -> bool:
    """Return whether a folder holds images, as far as the first image tells, and no
    folders before it."""
    seen = glimpsed(folder, lambda e: is_named_image(e.name) and not is_folder(e))
    return bool(seen) and is_named_image(seen[-1].name) and not is_folder(seen[-1])


def _only_splits(data: Path) -> bool:
    """Return whether all folders of a folder that hold images are named like splits, or
    one of them holds class folders: a folder of images among them is then no class. A
    run's folder, which holds a picture of its curves, doesn't count."""
    names = _classes_in(data)
    if any(is_class_folder_split(data, name) for name in names if split_of(name)):
        return True
    holding = [
        name
        for name in names[:LOOKED]
        if holds_images(data / name) and not is_file(data / name / "config.yaml")
    ]
    return tell_no_classes(holding)


def _of_folder(folder: Path, split: str) -> ImageSource:
    """Open a folder that isn't divided into splits."""
    classes = _classes_in(folder)
    inner = folder / "data"
    shards = _shards(folder) or (_shards(inner) if is_there(inner) else [])
    if shards and not any(holds_images(folder / name) for name in classes[:LOOKED]):
        return _of_files(shards[0].parent, shards, split)
    if not classes and _is_flat(folder):
        return FlatFolder(folder)
    return ClassFolders(folder)


def _shards(folder: Path) -> list[Path]:
    """Return the tar files and the parquet files in a folder."""
    files = [
        Path(entry.path)
        for entry in listed(folder)
        if entry.name.endswith((TAR, PARQUET)) and not is_hidden(entry.name) and is_file(entry.path)
    ]
    return sorted(files, key=lambda file: natural(file.name))


def _of_files(place: Path, files: Sequence[Path], split: str) -> ImageSource:
    """Open tar files, or parquet files."""
    require_one_kind(place, files)
    if missing := [file for file in files if not is_file(file)]:
        raise DataError(
            f"there is no file {missing[0]}, of {len(files):,} that {place} names; get it, or name "
            f"those that are there"
        )
    mine, others = split_among(place, files, split, named=not is_there(place))
    if others:
        raise _no_split(place, split, others)
    return open_containers(place, LocalFiles(mine), split)


def _of_file(file: Path, split: str) -> ImageSource:
    suffix = file.suffix.lower()
    if suffix in CONTAINERS:
        return open_containers(file, LocalFiles([file]), split)
    if suffix in PACKED:
        raise DataError(
            f"{file} is compressed, so no image in it can be read by its place; unpack it into a "
            f"folder, or into a tar file"
        )
    if suffix not in LISTS:
        raise DataError(f"{file} is none of what --data can be: {KINDS} ({', '.join(LISTS)})")
    lines = [line.strip() for line in lines_of(file) if line.strip()]
    if lines and all(map(is_url, lines)):
        return open_list(file, lines, split)
    if lines and all(line.endswith(tuple(CONTAINERS)) for line in lines):
        return _of_files(file, [file.parent / line for line in lines], split)
    return ImageList(file, split)


def _matching(pattern: Path) -> list[Path]:
    """Return the files that a pattern names: braces first, whose files need not exist,
    then wildcards."""
    found = []
    for text in braces(str(pattern)):
        if glob.has_magic(text):
            found += sorted(map(Path, glob.glob(text)), key=lambda file: natural(str(file)))
        elif text != str(pattern):
            found.append(Path(text))
    return found


def _no_split(data: Path, split: str, splits: Sequence[str]) -> DataError:
    """Return the refusal of a split that a folder doesn't hold, but holds others."""
    if is_there(data / split):
        return DataError(f"{data / split} holds no class folders; name another --split")
    if not is_there(data):
        return DataError(
            f"{data} has {' and '.join(splits)} but no {split}; name another --split, or the files "
            f"of one split"
        )
    folders = [e.name for e in listed(data) if not is_hidden(e.name) and is_folder(e)]
    near = [name for name in sorted(folders) if name not in splits and split_of(name)]
    meant = [name for name in near if split_of(name) == split_of(split)] or near
    return DataError(
        f"{data} has {' and '.join(splits)} but no {split}; name another --split"
        + (f", for example --split {meant[0]}" if meant else "")
        + ", or add the folder"
    )
