"""Read images that a list names: a CSV, TSV or text file of paths and classes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.images.names import is_named_image, on_disk, split_of
from pipeline.images.patience import DataError, read_file
from pipeline.images.sources.files import FileSource
from pipeline.images.sources.source import Classes, Listing
from pipeline.images.sources.told_names import class_of, match_classes
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted, same, some

LISTS = (".csv", ".tsv", ".txt", ".lst")
# Names of columns, in small letters without separators, in the order of preference.
PATHS = ("path", "filepath", "imagepath", "file", "filename", "image", "imagename", "name")
SPLITS = ("split", "subset", "set")
CLASSES = (
    "class",
    "classname",
    "label",
    "labelname",
    "category",
    "target",
    "classid",
    "classindex",
    "classes",
    "labels",
    "categories",
)


class ImageList(FileSource):
    """The images of a list. A name is the path in the list, relative to the list's own
    folder, or to the folder beside the list that has the list's name.

    A line has a path, and a class if the list tells one: a name or a number from 0. A
    first line of column names may be there. .csv has commas, .tsv tabs; in other files
    a tab, a comma or the last blank of a line is the separator. Of a column ``split``
    the lines of the split count that the user asked for.
    """

    def __init__(self, path: Path, split: str = "train") -> None:
        self.lines, self.others = _read(path, split)
        super().__init__(path, _folder(path, self.lines[0].name))
        numbers = np.array([line.number for line in self.lines], np.int64)
        self.told, self.index = match_classes(numbers, [line.label for line in self.lines])

    @property
    def divided(self) -> bool:
        return self.others > 0

    def describe(self) -> str:
        return "a list"

    def classes(self, known: Collection[str] = ()) -> Classes:
        return self.told

    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        names = [line.name for line in self.lines]
        found, missing = self.listing([*zip(names, self.index.tolist(), strict=True)])
        if missing:
            first = names.index(missing[0][0])
            raise DataError(
                f"{self.path} names {counted(len(missing), 'file')} that "
                f"{'is' if len(missing) == 1 else 'are'} not there, the first in line "
                f"{self.lines[first].place}: {self.file(names[first])}; put the list into the "
                f"folder that its paths begin in, or take the lines out"
            )
        return found

    def require_sound(self, split: str) -> None:
        untold = int((self.index < 0).sum())
        images = counted(len(self.lines), "image")
        classes = counted(len(self.told.names), "class", "classes")
        say(f"{self.path}: {images}, {classes}{' told by number' if self.told.numbered else ''}")
        if self.others:
            say(f"{self.path}: left out {counted(self.others, 'image')} of other splits")
        if untold and self.told.names:
            say(f"{self.path}: nothing tells the class of {counted(untold, 'image')}")


class Line(NamedTuple):
    """A line of a list: the image's name, the class's number or -1, the class's name or
    empty, and the line's number, from 1."""

    name: str
    number: int
    label: str
    place: int


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file. Raises DataError."""
    try:
        return read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is no text in UTF-8; --data must be a folder, a list, tar or parquet files"
        ) from None


def _read(path: Path, split: str) -> tuple[list[Line], int]:
    """Read a list. Returns the lines of a split, and the number of lines of other
    splits. Raises DataError."""
    lines = lines_of(path)
    table = _table(path, lines)
    if not table:
        raise DataError(f"{path} is empty; it must hold a path and a class in each line")
    columns = _columns(path, table[0][1])
    if columns is None:
        at, label, part = 0, 1, None
    else:
        at, label, part = columns
        table = table[1:]
    rows: list[Line] = []
    first: dict[str, int] = {}
    others: list[str] = []
    for line, cells in table:
        if at >= len(cells) or not cells[at].strip():
            raise DataError(f"line {line} of {path} names no image; mend it, or take it out")
        if part is not None:
            told = cells[part].strip() if part < len(cells) else ""
            if told != split and (not split_of(told) or split_of(told) != split_of(split)):
                others.append(told)
                continue
        name = _name(path, cells[at].strip(), line)
        if other := first.get(same(name)):
            raise DataError(
                f"{path} names {name} twice, in lines {other} and {line}; take one of them out"
            )
        first[same(name)] = line
        told = cells[label].strip() if label is not None and label < len(cells) else ""
        rows.append(Line(name, *class_of(told), line))
    if others and not rows:
        raise DataError(
            f"{path} has no line of the split {split} ({some(sorted(set(others)))}); name another "
            f"--split"
        )
    if not rows:
        raise DataError(f"{path} names no image; it must hold a path and a class in each line")
    return rows, len(others)


def _table(path: Path, lines: list[str]) -> list[tuple[int, list[str]]]:
    """Return the number and the cells of each line that isn't empty."""
    begin = next((line for line in lines if line.strip()), "")
    suffix = path.suffix.lower()
    delimiter = "," if suffix == ".csv" else "\t" if suffix == ".tsv" or "\t" in begin else None
    if delimiter is None and "," in begin and not is_named_image(begin.rpartition(",")[2]):
        delimiter = ","
    if delimiter:
        reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter)
        try:
            return [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {path} can't be read ({error})") from None
    cut = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text:
            before, _, last = text.rpartition(" ")
            whole = not before or is_named_image(last)
            cut.append((number, [text] if whole else [before.strip(), last]))
    return cut


def _columns(path: Path, first: list[str]) -> tuple[int, int | None, int | None] | None:
    """Return the columns of path, class and split that a first line names; None if the
    line names an image. Raises DataError."""
    if is_named_image(first[0].strip().rpartition("/")[2]):
        return None
    names = ["".join(c for c in cell.casefold() if c.isalnum()) for cell in first]
    at = next((names.index(name) for name in PATHS if name in names), None)
    if at is None:
        if any(is_named_image(cell.strip().rpartition("/")[2]) for cell in first):
            raise DataError(f"the first column of {path} must hold the images' paths")
        raise DataError(
            f"{path} begins with {','.join(first)!r:.60}, which is no image's path and no line of "
            f"column names; name the columns path and class"
        )
    label, part = (
        next((names.index(name) for name in wanted if name in names), None)
        for wanted in (CLASSES, SPLITS)
    )
    return at, label, part


def _name(path: Path, text: str, line: int) -> str:
    """Return the name of a path in a list. Raises DataError for a path that leaves the
    list's folder."""
    if "\0" in text:
        raise DataError(f"line {line} of {path} holds a NUL; mend it, or take it out")
    name = text.replace("\\", "/")
    if name.startswith("/") or name[1:3] == ":/":
        inside = os.path.relpath(name, path.parent.absolute()) if name.startswith("/") else ".."
        name = inside.replace(os.sep, "/")
    name = os.path.normpath(name)
    if name.startswith(("../", "/")) or name in ("..", "."):
        raise DataError(
            f"line {line} of {path} leads out of the list's folder ({text}); put the list into "
            f"the folder that holds the images, with paths relative to it"
        )
    return name


def _folder(path: Path, first: str) -> Path:
    """Return the folder that the paths of a list begin in: the list's own, or the
    folder beside it that has its name."""
    beside = path.with_suffix("")
    own, other = path.parent / on_disk(first), beside / on_disk(first)
    return beside if not os.path.lexists(own) and os.path.lexists(other) else path.parent
