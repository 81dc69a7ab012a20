"""Read names as containers and lists tell them: of classes, of images, and of the split
that images lie in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.images.names import split_of, tells_no_class
from pipeline.images.patience import DataError
from pipeline.images.sources.source import Classes
from pipeline.runtime.wording import counted, some

MOST_DIGITS = 6  # of a class's number


def class_of(value: object) -> tuple[int, str]:
    """Return the number (-1 if there is none) and the name (empty if there is none) of
    a class, as it is told: a number from 0, or a name. A longer number than
    MOST_DIGITS is an identifier, and so a name. Anything else tells no class."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        value = str(int(value))
    text = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"[0-9]+(\.0+)?", text) and len(text.partition(".")[0]) <= MOST_DIGITS:
        return int(text.partition(".")[0]), ""
    if re.fullmatch(r"-[0-9]+(\.0+)?", text):  # -1 stands for no class in many data sets
        return -1, ""
    return -1, _encodable(text).replace("/", "%2F").replace("\0", "")


def _encodable(text: str) -> str:
    """Return a text that can be UTF-8; half a pair of surrogates becomes a question
    mark."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def safe_name(name: str) -> tuple[str, str]:
    """Return a name as the manifest has it, and why the image can't be used, or an
    empty reason. Nothing is ever written at a place that a container names; still, a
    name that leads elsewhere is no name in a data set."""
    name = _encodable(name).replace("\0", "")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    plain = "/".join(parts)
    if name.startswith("/") or ".." in parts:
        plain = plain.replace("..", "_").replace("/", "_")  # a folder would be a class
        return plain, f"its name leads out of the data set: {name}"
    return plain, ""


def match_classes(numbers: np.ndarray, told: Sequence[str]) -> tuple[Classes, np.ndarray]:
    """Match the numbers and the names that are told of images' classes.

    numbers: int64 [n], -1 where none is told. told: [n] names, empty where none is
    told. Numbers decide the order of the names if each number has one name and each
    name one number; numbers without names are names themselves. Returns the classes,
    and each image's place among them, int64 [n], or -1.
    """
    if not (numbers >= 0).any():
        known = sorted({name for name in told if name})
        place = {name: i for i, name in enumerate(known)}
        return Classes(known), np.array([place.get(name, -1) for name in told], np.int64)
    pairs = {(i, name) for i, name in zip(numbers.tolist(), told, strict=True) if i >= 0}
    name_of = dict(pairs)
    most = int(numbers.max()) + 1
    if not len(pairs) == len(name_of) == len(set(name_of.values())) or "" in name_of.values():
        return Classes([str(i) for i in range(most)], numbered=True), numbers
    if len(name_of) == most:
        return Classes([name_of[i] for i in range(most)]), numbers
    known = sorted(name_of.values())
    place_of = {number: known.index(name) for number, name in name_of.items()}
    return Classes(known), np.array([place_of.get(i, -1) for i in numbers.tolist()], np.int64)


def split_names(
    names: Sequence[str], path: Any, split: str
) -> tuple[list[str], np.ndarray, str | None]:
    """Find the images of a split, and their names below the folders that all of them
    share, as in the tar file of a folder of class folders.

    Returns the names, their places among the given ones, int64 [m], and what was left
    out, in words: empty if nothing was, None if the names lie in no splits. Raises
    DataError if they lie in other splits only.
    """
    names, places, left = [*names], np.arange(len(names)), None
    while names:
        folders = {name.partition("/")[0] if "/" in name else "" for name in names}
        splits = _splits(names, folders) if left is None else set()
        if splits:
            mine = _asked(splits, split)
            if mine is None:
                raise DataError(
                    f"{path} holds the folders {some(sorted(folders))}; name one of them as --split"
                )
            others = [one or "no folder" for one in sorted(folders - {mine})]
            rows = [i for i, name in enumerate(names) if name.startswith(f"{mine}/")]
            beside = len(names) - len(rows)
            verb = "lies" if beside == 1 else "lie"
            left = f"{counted(beside, 'image')} that {verb} in {some(others)}" if others else ""
            names, places = [names[i] for i in rows], places[rows]
        elif not _share_a_folder(names, folders):
            break
        names = [name.partition("/")[2] for name in names]
    return names, places, left


def _splits(names: Sequence[str], folders: set[str]) -> set[str]:
    """Return the folders that are splits: those named like splits that hold folders,
    or all, if all are named like splits. A class called train holds images."""
    if all(map(split_of, folders)):
        return folders
    deep = {name.partition("/")[0] for name in names if name.count("/") > 1}
    return {folder for folder in deep if split_of(folder)}


def _asked(splits: set[str], split: str) -> str | None:
    """Return the folder of a split: of its name, or of another name of it."""
    if split in splits:
        return split
    meant = split_of(split)
    return next((one for one in sorted(splits) if meant and split_of(one) == meant), None)


def _share_a_folder(names: Sequence[str], folders: set[str]) -> bool:
    """Return whether all names begin with one folder that is no class: one that holds
    folders only, or splits, or that is named for a kind of file."""
    if len(folders) > 1 or "" in folders:
        return False
    inner = {name.split("/")[1] for name in names if name.count("/") > 2}
    return (
        all(map(tells_no_class, folders))
        or all(name.count("/") > 1 for name in names)
        or any(map(split_of, inner))
    )
