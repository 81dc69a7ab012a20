"""Read images that lie in larger files, such as tar files: find each image's place once
(the index, kept in the user's cache folder), then read it there."""

from __future__ import annotations

import errno
import os
import re
import threading
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Collection, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache.format.manifest import Images, printable_paths
from pipeline.images.names import is_hidden, is_system_path, split_of, tells_no_class
from pipeline.images.patience import DataError, patiently, status
from pipeline.images.sources import kept
from pipeline.images.sources.folder_checks import tell_no_classes
from pipeline.images.sources.source import Classes, ImageSource, Listing
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.wording import counted, same, some

READERS = 16  # threads that read headers, which is mostly waiting for the disk
MOST_DIGITS = 6  # of a class's number
OPEN = 256  # files that are held open at once, of 1,024 that a system commonly allows


@dataclass
class Rows:
    """The images that one container holds, in its order.

    name: as it is told. own: another name, which is the image's own in its container;
    empty if it is the same. number: the class's number, -1 if it tells none. label: the
    class's name, empty if it tells none. reason: why the image can't be used, or empty.
    data: the file in which the images lie, if it is another. dropped: images that are
    no sample's own.
    """

    data: str = ""
    dropped: int = 0
    name: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    number: list[int] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        offset: int,
        size: int,
        *,
        number: int = -1,
        label: str = "",
        why: str = "",
        own: str = "",
    ) -> None:
        """Add an image."""
        self.name.append(name)
        self.own.append("" if own == name else own)
        self.number.append(number)
        self.label.append(label)
        self.offset.append(offset)
        self.size.append(size)
        self.reason.append(why)


class _Open:
    """An open file, which is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """Holds the most recently used files open. Threads may share it."""

    def __init__(self, most: int = OPEN) -> None:
        self.most, self.lock = most, threading.Lock()
        self.held: OrderedDict[Path, _Open] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Read bytes at an offset, patiently. Raises DataError if the disk fails now,
        or if the file is shorter."""
        return patiently(lambda: self._read(path, offset, size), path)

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        file, found = self._open(path), b""
        try:
            while len(found) < size:
                part = os.pread(file.descriptor, size - len(found), offset + len(found))
                if not part:
                    break
                found = found + part if found else part
        except OSError:
            self.forget(path)  # a file handle of NFS may have gone stale
            raise
        if len(found) < size:
            self.forget(path)
            raise OSError(errno.EIO, f"only {len(found):,} of {size:,} bytes came")
        return found

    def _open(self, path: Path) -> _Open:
        with self.lock:
            if path in self.held:
                self.held.move_to_end(path)
                return self.held[path]
        file = _Open(path)
        with self.lock:
            self.held[path] = file
            while len(self.held) > self.most:
                self.held.popitem(last=False)
        return file

    def forget(self, path: Path) -> None:
        """Open a file anew when it is read next."""
        with self.lock:
            self.held.pop(path, None)


_files = OpenFiles()


@dataclass(frozen=True)
class Index:
    """The images of all containers, sorted by name. The first axis is [n].

    name: str, packed. label: int32, a place in ``classes.names``, or -1. place: int64
    [n, 3], container, offset and length. reason: str, packed. data: the file in which
    each container's images lie, empty for the container itself. divided: the
    containers hold several splits, and these are the images of one. notes: lines for
    the user.
    """

    n: int
    name: np.ndarray
    label: np.ndarray
    place: np.ndarray
    reason: np.ndarray
    classes: Classes
    data: list[str]
    divided: bool
    notes: list[str]

    def save(self) -> dict[str, np.ndarray]:
        """Return the index as arrays."""
        return {
            "n": np.array(self.n),
            "name": self.name,
            "label": self.label,
            "place": self.place,
            "reason": self.reason,
            "classes": kept.packed(self.classes.names),
            "count": np.array(len(self.classes.names)),
            "numbered": np.array(self.classes.numbered),
            "data": kept.packed(self.data),
            "divided": np.array(self.divided),
            "notes": kept.packed(self.notes),
            "lines": np.array(len(self.notes)),
        }

    @classmethod
    def load(cls, columns: dict[str, np.ndarray]) -> Index:
        """Make the index of saved arrays."""
        names = kept.unpacked(columns["classes"], int(columns["count"])).tolist()
        return cls(
            int(columns["n"]),
            columns["name"],
            columns["label"],
            columns["place"],
            columns["reason"],
            Classes(names, bool(columns["numbered"])),
            kept.unpacked(columns["data"], len(columns["found"])).tolist(),
            bool(columns["divided"]),
            kept.unpacked(columns["notes"], int(columns["lines"])).tolist(),
        )


class Containers(ImageSource):
    """Images in containers.

    files: the containers, in the order of their numbers. split: that the user asked
    for, which counts if the containers hold several splits. kind: of a container, for
    messages: "tar file".
    """

    kind = "container"

    def __init__(self, path: Path, files: Sequence[Path], split: str = "train") -> None:
        super().__init__(path)
        self.files, self.split = [*files], split
        self._index: Index | None = None

    @abstractmethod
    def rows_of(self, file: Path) -> Rows:
        """Read the headers of a container. Raises DataError."""

    def describe(self) -> str:
        return counted(len(self.files), self.kind)

    def data_file(self, number: int) -> Path:
        """Return the file in which a container's images lie."""
        return Path(self.index().data[number] or self.files[number])

    def prepare(self) -> None:
        """Say what reading the headers takes, before they are read. Raises DataError if
        it can't be done."""
        return None

    def classes(self, known: Collection[str] = ()) -> Classes:
        return self.index().classes

    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        index = self.index()
        changed = np.array([found[1] for found in self._found], np.int64)
        return Listing(
            kept.unpacked(index.name, index.n),
            index.label,
            index.place[:, 2].copy(),
            changed[index.place[:, 0]],
            index.place,
            kept.unpacked(index.reason, index.n),
        )

    def read(self, address: Any) -> bytes:
        number, offset, size = (int(part) for part in address)
        return _files.read(self.data_file(number), offset, size) if size else b""

    def where(self, address: Any) -> str:
        number, offset, size = (int(part) for part in address)
        return f"{self.files[number]} (bytes {offset:,} to {offset + size:,})"

    def addresses(self, images: Images) -> np.ndarray:
        index = self.index()
        names = kept.unpacked(index.name, index.n)
        row = {same(printable_paths(name)): i for i, name in enumerate(names.tolist())}
        there = np.array([row.get(same(path), -1) for path in images.path.tolist()], np.int64)
        if (missing := images.usable[there[images.usable] < 0]).size:
            raise DataError(
                f"{self.path} has no image {images.path[missing[0]]}; pass the images that the "
                f"manifest was made from"
            )
        return np.where((there < 0)[:, None], 0, index.place[there])

    @property
    def divided(self) -> bool:
        return self.index().divided

    def require_sound(self, split: str) -> None:
        index = self.index()
        told = len(index.classes.names)
        classes = f"{told:,} class{'es' * (told != 1)}" if told else "no classes"
        numbered = ", told by number" if index.classes.numbered else ""
        say(f"{self.path}: {self.describe()} with {index.n:,} images of {classes}{numbered}")
        for line in index.notes:
            say(f"{self.path}: {line}")

    def index(self) -> Index:
        """Return the index: as kept from an earlier start, if no container has changed
        since; otherwise it is read now, and kept."""
        if self._index is None:
            self._found = [self._status(file) for file in self.files]
            # A link's own name may be that of a class.
            places = [f"{os.path.abspath(f)}\n{os.path.realpath(f)}" for f in self.files]
            split = split_of(self.split) or self.split
            file = kept.file_for(type(self).__name__, split, *places)
            kept.once(file, lambda: self._recalled(file), lambda: self._made(file))
        return self._index

    def _recalled(self, file: Path) -> bool:
        """Take the index that an earlier start has kept, if it is of these files."""
        columns = kept.kept(file)
        if columns is not None and np.array_equal(columns["found"], np.array(self._found)):
            index = Index.load(columns)
            if all(os.path.exists(data) for data in index.data if data):
                self._index = index
        return self._index is not None

    def _made(self, file: Path) -> None:
        """Read the headers, and keep the index."""
        self.prepare()
        self._index = self._read_headers()
        kept.keep(file, self._index.save() | {"found": np.array(self._found, np.int64)})

    def _status(self, file: Path) -> tuple[int, int]:
        found = status(file)
        if found is None:
            raise DataError(f"{file} is gone since it was listed; run the same command again")
        return found.st_size, found.st_mtime_ns

    def _read_headers(self) -> Index:
        with (
            Progress("reading headers", len(self.files), f"{self.kind}s") as progress,
            ThreadPoolExecutor(READERS) as pool,
        ):
            several = []
            try:
                for rows in pool.map(self.rows_of, self.files):
                    several.append(rows)
                    progress.advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return make_index(self.files, several, self.path, self.split)


def make_index(files: Sequence[Path], several: Sequence[Rows], path: Path, split: str) -> Index:
    """Join the rows of containers: name each image, and match names and numbers of
    classes. split: which counts, if the images lie in folders of several splits. Raises
    DataError."""
    names, inside, left = split_names([n for rows in several for n in rows.name], path, split)
    owner = np.repeat(np.arange(len(files)), [len(rows.name) for rows in several])[inside]
    numbers, offsets, sizes = (
        np.array([value for rows in several for value in getattr(rows, column)], np.int64)[inside]
        for column in ("number", "offset", "size")
    )
    place = np.stack([owner, offsets, sizes], axis=1)
    labels, reasons, own = (
        [column[i] for i in inside.tolist()]
        for column in (
            [label for rows in several for label in rows.label],
            [reason for rows in several for reason in rows.reason],
            [name for rows in several for name in rows.own],
        )
    )
    notes: list[str] = []
    if left:
        notes.append(f"left out {left}")
    if dropped := sum(rows.dropped for rows in several):
        notes.append(f"left out {counted(dropped, 'image')} beside the image of a sample")
    classes, index = _classes(names, numbers, labels)
    by_folder = not classes.numbered and not any(labels)
    if len(classes.names) > 1 and by_folder and tell_no_classes(classes.names):
        raise DataError(
            f"the folders in {path} ({some(classes.names)}) are named like splits or kinds of "
            f"files, and tell no classes; pass tar files of the images alone, or a list of paths "
            f"and classes"
        )
    wanted = [
        i
        for i, name in enumerate(names)
        if not is_system_path(name) and not any(map(is_hidden, name.split("/")))
    ]
    if not wanted:
        raise DataError(
            f"{path} holds no images; pass tar files, parquet files or a folder that hold some"
        )
    if classes.names and not classes.numbered:
        names = [
            name if "/" in name or at < 0 else f"{classes.names[at]}/{name}"
            for name, at in zip(names, index.tolist(), strict=True)
        ]
    names = _told_apart(names, own, owner, files)
    first: dict[str, int] = {}
    for i in wanted:
        first.setdefault(names[i], i)
    if twice := len(wanted) - len(first):
        example = next(names[i] for i in wanted if first[names[i]] != i)
        notes.append(
            f"left out {counted(twice, 'image')} whose name another image of the same file has "
            f"(the first is {printable_paths(example)})"
        )
    if untold := int((index < 0).sum()) if classes.names else 0:
        notes.append(f"nothing tells the class of {counted(untold, 'image')}")
    order = [first[name] for name in sorted(first)]
    return Index(
        len(order),
        kept.packed([names[i] for i in order]),
        index[order].astype(np.int32),
        place[order],
        kept.packed([reasons[i] for i in order]),
        classes,
        [rows.data for rows in several],
        left is not None,
        notes,
    )


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
        # In no folder, since a folder would be a class.
        return plain.replace("..", "_").replace(
            "/", "_"
        ), f"its name leads out of the data set: {name}"
    return plain, ""


def split_names(
    names: Sequence[str], path: Path, split: str
) -> tuple[list[str], np.ndarray, str | None]:
    """Find the images of a split, and the names below what they have in common.

    Folders that all names begin with are taken away, as in the tar file of a folder of
    class folders; the last such folder stays if it is a class. A folder that is named
    like a split is one if it holds folders, or if all others are named so, too. Returns
    the names, their places among the given ones, int64 [m], and what was left out in
    words; None if the names lie in no splits. Raises DataError.
    """
    places, left = np.arange(len(names)), None
    names = list(names)
    while names:
        folders = {name.partition("/")[0] if "/" in name else "" for name in names}
        deep = {name.partition("/")[0] for name in names if name.count("/") > 1}
        splits = {one for one in folders if split_of(one) and one in deep}
        if all(map(split_of, folders)):
            splits = folders
        if splits and left is None:
            mine = split if split in folders else ""
            mine = mine or next((f for f in sorted(splits) if split_of(f) == split_of(split)), "")
            if not mine:
                raise DataError(
                    f"{path} holds the folders {some(sorted(folders))}; name one of them as --split"
                )
            begin = f"{mine}/"
            rows = [i for i, name in enumerate(names) if name.startswith(begin)]
            others = sorted(folders - {mine})
            beside = len(names) - len(rows)
            left = f"{counted(beside, 'image')} that {'lies' if beside == 1 else 'lie'} in "
            left += some([one or "no folder" for one in others]) if others else ""
            left = left if others else ""
            names, places = [names[i][len(begin) :] for i in rows], places[rows]
            continue
        if len(folders) > 1 or "" in folders:
            break
        (shared,) = folders
        deeper = all(name.count("/") > 1 for name in names)
        inner = {name.split("/")[1] for name in names if name.count("/") > 2}
        if not tells_no_class(shared) and not deeper and not any(map(split_of, inner)):
            break  # one class, and images in it
        names = [name[len(shared) + 1 :] for name in names]
    return names, places, left


def _classes(
    names: Sequence[str], numbers: np.ndarray, labels: Sequence[str]
) -> tuple[Classes, np.ndarray]:
    """Match what is told of classes. Returns the classes, and each image's place among
    them, int64 [n], or -1.

    A class's name is what the container says, otherwise the image's folder. Numbers
    decide the order of the names, if each number has one name and each name one number.
    """
    told = [
        label or (name.partition("/")[0] if "/" in name else "")
        for name, label in zip(names, labels, strict=True)
    ]
    numbered = numbers >= 0
    if not numbered.any():
        known = sorted({name for name in told if name})
        place = {name: i for i, name in enumerate(known)}
        return Classes(known), np.array([place.get(name, -1) for name in told], np.int64)
    pairs = {
        (number, name) for number, name in zip(numbers.tolist(), told, strict=True) if number >= 0
    }
    most = int(numbers.max()) + 1
    one_name = all(name for _, name in pairs) and len(pairs) == len({p[0] for p in pairs})
    if one_name and len(pairs) == len({p[1] for p in pairs}):
        if len(pairs) == most:
            return Classes([name for _, name in sorted(pairs)]), numbers
        known = sorted(name for _, name in pairs)
        place = {number: known.index(name) for number, name in pairs}
        return Classes(known), np.array([place.get(n, -1) for n in numbers.tolist()], np.int64)
    return Classes([str(i) for i in range(most)], numbered=True), numbers


def _told_apart(
    names: Sequence[str], own: Sequence[str], owner: np.ndarray, files: Sequence[Path]
) -> list[str]:
    """Tell images apart that have one name: by their own names in one container, and by
    the containers' names if several containers use a name."""
    found, owners = list(names), owner.tolist()
    count = Counter(zip(found, owners, strict=True))
    for i, name in enumerate(found):
        if count[name, owners[i]] > 1 and own[i]:
            folder = name.rpartition("/")[0]
            found[i] = f"{folder}/{own[i].rpartition('/')[2]}".lstrip("/")
    containers: dict[str, set[int]] = {}
    for name, number in zip(found, owners, strict=True):
        containers.setdefault(name, set()).add(number)
    tails = _tails(files) if any(len(several) > 1 for several in containers.values()) else []
    return [
        f"{name.rpartition('/')[0]}/{tails[number]}/{name.rpartition('/')[2]}".lstrip("/")
        if len(containers[name]) > 1
        else name
        for name, number in zip(found, owners, strict=True)
    ]


def _tails(files: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the files' paths that tell all of them apart, without
    suffixes."""
    parts = [file.absolute().with_suffix("").parts for file in files]
    for length in range(1, max(map(len, parts)) + 1):
        tails = ["/".join(one[-length:]).lstrip("/") for one in parts]
        if len(set(tails)) == len(tails):
            break
    return tails
