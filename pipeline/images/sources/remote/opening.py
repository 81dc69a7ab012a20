"""Find out what a URL of --data names, and which part of it is the split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.images.names import is_hidden, natural
from pipeline.images.patience import DataError
from pipeline.images.sources.image_list import LISTS
from pipeline.images.sources.parquet import PARQUET
from pipeline.images.sources.remote.files import RemoteFiles
from pipeline.images.sources.remote.listing import found, listed
from pipeline.images.sources.remote.store import Object, require_obstore
from pipeline.images.sources.remote.url import Url
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
from pipeline.runtime.wording import some

MAGIC = re.compile(r"[*?\[]")


def open_url(url: Url, split: str) -> ImageSource:
    """Open the images of a split.

    url: of a tar or parquet file, of a pattern of such files, or of a folder of a
    bucket that holds them, for every split or for each. Raises DataError.
    """
    require_obstore(url)
    several = [replace(url, path=path) for path in braces(url.path)]
    if len(several) > 1 or MAGIC.search(url.path):
        return _of_pattern(url, several, split)
    suffix = url.suffix.lower()
    if suffix in CONTAINERS:
        return _of_objects(url, found([url]), split, named=True)
    if suffix in PACKED:
        raise DataError(
            f"{url} is compressed, so no image in it can be read by its place; store it unpacked"
        )
    if suffix in LISTS:
        raise DataError(
            f"{url} is a list, and lists are read from disks only; copy it here, with the URL of "
            f"a tar file on each line"
        )
    if url.is_web:
        raise DataError(
            f"{url} is no tar file, and web servers don't list their files; name them, for "
            f"example '{url}/x-{{000000..001023}}.tar'"
        )
    return _of_folder(url, split)


def open_list(file: Path, lines: Sequence[str], split: str) -> ImageSource:
    """Open the files whose URLs a list has. Raises DataError."""
    require_obstore(file)
    urls = [Url.parse(line) for line in lines]
    return _of_objects(file, found(urls), split, named=True)


def in_remote_split(folder: Url, name: str) -> ImageSource | None:
    """Open what a folder of a bucket holds for a split: files in FOLDER/NAME, or files
    in FOLDER (or FOLDER/data) whose names tell the split. Returns None if it holds
    nothing for the split alone."""
    if folder.is_web or folder.suffix in CONTAINERS or MAGIC.search(folder.path):
        return None
    if len(braces(folder.path)) > 1:
        return None
    if shards := _shards(folder / name):
        return _of_objects(folder / name, shards, name, named=False)
    for place in (folder, folder / "data"):
        shards = _shards(place)
        if any(tells_split(one.url) for one in shards) and of_split(
            [one.url for one in shards], name
        ):
            return _of_objects(place, shards, name, named=False)
    return None


def _of_folder(folder: Url, split: str) -> ImageSource:
    if source := in_remote_split(folder, split):
        return source
    others = [name for name in ("train", "val") if name != split]
    if others := [name for name in others if in_remote_split(folder, name)]:
        raise _no_split(folder, split, others)
    for place in (folder, folder / "data"):
        if shards := _shards(place):
            return _of_objects(place, shards, split, named=False)
    objects, folders = listed(folder)
    there = some([*(f"{name}/" for name in folders), *(one.url.name for one in objects)])
    raise DataError(
        f"{folder} holds no tar or parquet files ({there or 'it is empty'}); "
        + (
            "pack the images of class folders into tar files, and name their folder"
            if there
            else "correct the URL"
        )
    )


def _shards(folder: Url) -> list[Object]:
    """Return the tar files and the parquet files in a folder of a bucket."""
    shards = [
        one
        for one in listed(folder)[0]
        if one.url.name.endswith((TAR, PARQUET)) and not is_hidden(one.url.name)
    ]
    return sorted(shards, key=lambda one: natural(one.url.name))


def _of_pattern(pattern: Url, several: Sequence[Url], split: str) -> ImageSource:
    """Open the files that a pattern names: braces first, whose files must exist, then
    wildcards."""
    if not any(MAGIC.search(url.path) for url in several):
        return _of_objects(pattern, found(several), split, named=True)
    if pattern.is_web:
        raise DataError(
            f"{pattern} has wildcards, and web servers don't list their files; write braces, for "
            f"example x-{{000000..001023}}.tar"
        )
    objects: list[Object] = []
    for url in several:
        if MAGIC.search(url.parent.path):
            raise DataError(
                f"{pattern} has wildcards in the name of a folder; name one folder, or write braces"
            )
        inside = [one for one in listed(url.parent)[0] if fnmatchcase(one.url.name, url.name)]
        objects += sorted(inside, key=lambda one: natural(one.url.name))
    if not objects:
        raise DataError(f"there is no file {pattern}; correct the pattern")
    return _of_objects(pattern, objects, split, named=True)


def _of_objects(place: Any, objects: Sequence[Object], split: str, *, named: bool) -> ImageSource:
    """Open objects of one kind. place: that the user named."""
    urls = [one.url for one in objects]
    require_one_kind(place, urls)
    mine, others = split_among(place, urls, split, named=named)
    if others:
        raise _no_split(place, split, others)
    wanted = set(mine)
    objects = [one for one in objects if one.url in wanted]
    parents = {one.url.parent for one in objects}
    where = parents.pop() if len(parents) == 1 else replace(objects[0].url, path="")
    return open_containers(place, RemoteFiles(objects, where), split)


def _no_split(place: Any, split: str, splits: Sequence[str]) -> DataError:
    return DataError(
        f"{place} has {' and '.join(splits)} but no {split}; name another --split, or the files "
        f"of one split"
    )
