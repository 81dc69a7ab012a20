"""Index the images of containers: name each image, and keep where its bytes lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from cache.format.manifest import printable_paths
from pipeline.images.names import is_hidden, is_system_path
from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.folder_checks import tell_no_classes
from pipeline.images.sources.source import Classes
from pipeline.images.sources.told_names import match_classes, split_names
from pipeline.runtime.wording import counted, some


class Row(NamedTuple):
    """An image in a container.

    name: as it is told. own: a name that no other image of the container has; empty if
    there is none. offset, size: of its bytes. number: the class's number, -1 if none is
    told. label: the class's name, empty if none is told. reason: why the image can't be
    used, or empty.
    """

    name: str
    offset: int
    size: int
    number: int = -1
    label: str = ""
    reason: str = ""
    own: str = ""


@dataclass
class Contents:
    """The contents of one container.

    rows: its images, in its order. data: the file in which they lie, if it is another.
    beside: number of images that are part of another image's sample, and left out.
    """

    rows: list[Row] = field(default_factory=list)
    data: str = ""
    beside: int = 0


@dataclass(frozen=True)
class Index:
    """The images of all containers, sorted by name. The first axis is [n].

    name: str, packed. label: int32, a place in ``classes.names``, or -1. place: int64
    [n, 3], container, offset and length. reason: str, packed. data: the file in which
    each container's images lie, empty for the container itself. divided: the
    containers hold several splits, and these are the images of one. notes: lines for
    the user.
    """

    name: np.ndarray
    label: np.ndarray
    place: np.ndarray
    reason: np.ndarray
    classes: Classes
    data: list[str]
    divided: bool
    notes: list[str]

    def __len__(self) -> int:
        return len(self.label)

    def save(self) -> dict[str, np.ndarray]:
        """Return the index as arrays."""
        return {
            "name": self.name,
            "label": self.label,
            "place": self.place,
            "reason": self.reason,
            "classes": kept.packed(self.classes.names),
            "numbered": np.array(self.classes.numbered),
            "data": kept.packed(self.data),
            "divided": np.array(self.divided),
            "notes": kept.packed(self.notes),
        }

    @classmethod
    def load(cls, columns: dict[str, np.ndarray]) -> Index:
        """Make the index of saved arrays."""
        return cls(
            columns["name"],
            columns["label"],
            columns["place"],
            columns["reason"],
            Classes(kept.unpacked(columns["classes"]).tolist(), bool(columns["numbered"])),
            kept.unpacked(columns["data"]).tolist(),
            bool(columns["divided"]),
            kept.unpacked(columns["notes"]).tolist(),
        )


def make_index(
    files: Sequence[PurePath], several: Sequence[Contents], path: Any, split: str
) -> Index:
    """Join the contents of containers: name each image, and match names and numbers of
    classes.

    files: absolute paths of the containers. path: that the user named, for messages.
    split: which counts, if the images lie in folders of several splits. Raises
    DataError.
    """
    rows = [row for contents in several for row in contents.rows]
    owner = np.repeat(np.arange(len(files)), [len(contents.rows) for contents in several])
    names, inside, left = split_names([row.name for row in rows], path, split)
    rows, owner = [rows[i] for i in inside.tolist()], owner[inside]
    wanted = [
        i
        for i, name in enumerate(names)
        if not is_system_path(name) and not any(map(is_hidden, name.split("/")))
    ]
    if not wanted:
        raise DataError(
            f"{path} holds no images; pass tar files, parquet files or a folder that hold some"
        )
    told = [
        row.label or (name.partition("/")[0] if "/" in name else "")
        for row, name in zip(rows, names, strict=True)
    ]
    classes, label = match_classes(np.array([row.number for row in rows], np.int64), told)
    by_folder = not classes.numbered and not any(row.label for row in rows)
    if len(classes.names) > 1 and by_folder and tell_no_classes(classes.names):
        raise DataError(
            f"the folders in {path} ({some(classes.names)}) are named like splits or kinds of "
            f"files, and tell no classes; pass tar files of the images alone, or a list of paths "
            f"and classes"
        )
    if classes.names and not classes.numbered:
        names = [
            name if "/" in name or at < 0 else f"{classes.names[at]}/{name}"
            for name, at in zip(names, label.tolist(), strict=True)
        ]
    names = _told_apart(names, [row.own for row in rows], owner.tolist(), files)
    first: dict[str, int] = {}
    for i in wanted:
        first.setdefault(names[i], i)
    twice = [names[i] for i in wanted if first[names[i]] != i]
    order = [first[name] for name in sorted(first)]
    untold = int((label[order] < 0).sum()) if classes.names else 0
    notes = {
        f"left out {left}": left,
        f"left out {counted(beside := sum(c.beside for c in several), 'image')} beside the image "
        f"of a sample": beside,
        f"left out {counted(len(twice), 'image')} whose name another image of the same file has "
        f"(the first is {printable_paths(twice[0]) if twice else ''})": twice,
        f"nothing tells the class of {counted(untold, 'image')}": untold,
    }
    return Index(
        kept.packed([names[i] for i in order]),
        label[order].astype(np.int32),
        np.array([(owner[i], rows[i].offset, rows[i].size) for i in order], np.int64),
        kept.packed([rows[i].reason for i in order]),
        classes,
        [contents.data for contents in several],
        left is not None,
        [note for note, there in notes.items() if there],
    )


def _told_apart(
    names: Sequence[str], own: Sequence[str], owner: Sequence[int], files: Sequence[PurePath]
) -> list[str]:
    """Tell images apart that have one name: by their own names in one container, and by
    the containers' names if several containers use a name."""
    found = list(names)
    several = {name for name, count in Counter(found).items() if count > 1}
    here = Counter((name, at) for name, at in zip(found, owner, strict=True) if name in several)
    for i, name in enumerate(found):
        if here[name, owner[i]] > 1 and own[i]:
            found[i] = _beside(name, own[i])
    several = {name for name, count in Counter(found).items() if count > 1}
    places: dict[str, set[int]] = {name: set() for name in several}
    for name, at in zip(found, owner, strict=True):
        if name in several:
            places[name].add(at)
    tails = _tails(files) if several else []
    return [
        _beside(name, f"{tails[at]}/{name.rpartition('/')[2]}")
        if name in several and len(places[name]) > 1
        else name
        for name, at in zip(found, owner, strict=True)
    ]


def _beside(name: str, other: str) -> str:
    """Return another name in the folder of a name."""
    return f"{name.rpartition('/')[0]}/{other}".lstrip("/")


def _tails(files: Sequence[PurePath]) -> list[str]:
    """Return the shortest ends of the files' paths that tell all of them apart, without
    suffixes."""
    parts = [file.with_suffix("").parts for file in files]
    for length in range(1, max(map(len, parts)) + 1):
        tails = ["/".join(one[-length:]).lstrip("/") for one in parts]
        if len(set(tails)) == len(tails):
            break
    return tails
