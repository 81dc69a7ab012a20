"""Tell from the names of tar and parquet files which belong together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from pipeline.images.names import split_of, split_within
from pipeline.images.patience import DataError
from pipeline.images.sources.container_files import ContainerFiles
from pipeline.images.sources.containers import Containers
from pipeline.images.sources.parquet import PARQUET, ParquetFiles
from pipeline.images.sources.tars import TAR, Tars
from pipeline.runtime.progress import say
from pipeline.runtime.wording import some

CONTAINERS: dict[str, type[Containers]] = {TAR: Tars, PARQUET: ParquetFiles}
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def require_one_kind(place: Any, files: Sequence[Any]) -> None:
    """Raise DataError unless files are tar files alone, or parquet files alone. files:
    paths or URLs. place: what names them."""
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(CONTAINERS):
        raise DataError(
            f"{place} names {some([file.name for file in files])}; name tar files alone, or "
            f"parquet files alone"
        )


def open_containers(place: Any, files: ContainerFiles, split: str) -> Containers:
    """Open files of one kind as the images of a split. place: that the user named."""
    return CONTAINERS[files.names[0].suffix.lower()](place, files, split)


def tells_split(file: Any) -> str | None:
    """Return the split that a file's name tells: the whole name (train.tar), or one
    word of a name with a number (x-train-0007.tar). bullet_train.tar is a class."""
    numbered = any(c.isdigit() for c in file.stem)
    return split_of(file.stem) or (split_within(file.stem) if numbered else None)


def of_split(files: Sequence[Any], split: str) -> list[Any]:
    """Return the files whose names tell a split, in the words of its name or in
    others."""
    return [
        file
        for file in files
        if split.casefold() in re.split(r"[^a-z]+", file.stem.casefold())
        or tells_split(file) == (split_of(split) or split)
    ]


def split_among(
    place: Any, files: Sequence[Any], split: str, *, named: bool
) -> tuple[Sequence[Any], list[str]]:
    """Find the files of a split. Returns them, and the splits that there are if the
    split isn't among them.

    named: the files were named one by one, and are taken as they are, unless their
    names tell several splits. What else is left out is said.
    """
    told = {found for file in files if (found := tells_split(file))}
    unclear = [file for file in files if not tells_split(file)]
    if len(told) < 2 and not (told and unclear and not named):
        return files, []
    mine = of_split(files, split)
    if not mine:
        return [], sorted(told)
    if left := [file.name for file in unclear if file not in mine]:
        say(f"{place}: left out {some(left)}, whose names don't tell the split {split}")
    return mine, []


def braces(text: str) -> list[str]:
    """Expand {000..127} and {a,b} in a text, as a shell does."""
    if not (found := re.search(r"\{([^{}]*)\}", text)):
        return [text]
    inside = found[1]
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(ends[1]), int(ends[2])
        width = len(ends[1]) if ends[1].startswith("0") or len(ends[1]) == len(ends[2]) else 0
        options = [f"{i:0{width}d}" for i in range(first, last + 1)]
    elif "," in inside:
        options = inside.split(",")
    else:
        return [text]
    before, behind = text[: found.start()], text[found.end() :]
    return list(itertools.chain(*(braces(f"{before}{one}{behind}") for one in options)))
