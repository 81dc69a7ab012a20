"""Tell which label file belongs to which image, as far as all formats do so alike."""

from __future__ import annotations

import hashlib
import json
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.format.validate import MOST_VIEWS
from pipeline.exchange.label_files import LabelFileError
from pipeline.exchange.label_kinds import dense
from pipeline.images.data_set import DataSet
from pipeline.images.patience import read_file, status
from pipeline.runtime.wording import counted, some

TELLING = 64  # label files whose bytes identify a label set, beside all names and sizes


class LabelSet(ABC):
    """The label files of a folder that belong to the images of a data set.

    root: the folder of the files. files: path of each image's file below ``root``.
    sizes: its size in bytes; -1 if there is none. classes: of a label. kind: of the
    labels (label_kinds.py). crops: in each file. views: of these, the number in use,
    from the first on. half: whether numbers are in half precision. digest: hex sha256
    over all names and sizes and some files.
    """

    format: str
    # What the labelled crops were resized with, if the user says nothing.
    interpolation: str
    teachers: Sequence[str] = ()  # names of the models that made the labels, if files tell
    image_size: int | None = None  # of the teachers, pixels, if files tell
    mean: list[float] | None = None  # the teachers' normalisation, if files tell
    std: list[float] | None = None

    def __init__(self, root: Path, classes: int) -> None:
        self.root, self.classes = root, classes
        self.files: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.kind, self.crops, self.views, self.half, self.digest = "", 0, 0, False, ""

    @abstractmethod
    def read(
        self, image: str, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the first ``views`` crops of an image of this size in pixels. Returns
        boxes int32 [views, 4] in pixels, flips bool [views], and labels [views, …] as
        the file stores them. Raises LabelFileError."""

    def require_classes(self, data: DataSet) -> None:
        """Raise LabelFileError if the labels have classes that the images lack."""
        if foreign := self.foreign_classes(data.class_names):
            raise LabelFileError(
                f"{self.root} has label files of {counted(len(foreign), 'class', 'classes')} "
                f"({some(foreign)}) that {data.path} has no folder of, so the numbers of classes "
                f"would shift; pass all class folders' names, in the labels' order, as a "
                f"--class-map"
            )

    def foreign_classes(self, names: Sequence[str]) -> list[str]:
        """List the classes of the labels that aren't among ``names``, as far as files
        name classes. Labels know their classes by number, so every number would mean
        another class."""
        return []

    def labelled(self, image: str) -> bool:
        """Return whether an image has a label file."""
        return self.sizes.get(image, -1) >= 0

    def file(self, image: str) -> Path:
        """Return the path of an image's label file."""
        return self.root / self.files[image]

    def show(self, views: int) -> None:
        """Use the first ``views`` crops of each image. Raises LabelFileError if there
        are fewer crops."""
        if views > min(self.crops, MOST_VIEWS):
            raise LabelFileError(
                f"{views} views are wanted, and the label files have {self.crops} crops; lower "
                f"--views, or leave it out for all"
            )
        self.views = views

    def dense(self, labels: np.ndarray) -> np.ndarray:
        """Expand labels to float32 [n, classes], rows summing to one. Raises ValueError
        for labels that are no probabilities."""
        return dense(labels, self.kind, self.classes)

    def _identify(self) -> None:
        there = sorted(image for image in self.files if self.labelled(image))
        digest = hashlib.sha256(
            json.dumps([[self.files[image], self.sizes[image]] for image in there]).encode()
        )
        for image in there[:TELLING]:
            digest.update(read_file(self.file(image)))
        self.digest = digest.hexdigest()

    def _other(self, path: Path, kind: str, crops: int) -> LabelFileError:
        return LabelFileError(
            f"{path} has {crops} crops with labels of kind {kind}, others have {self.crops} of "
            f"kind {self.kind}; get it anew, take fewer with --views, or leave its image out: "
            "remove the file, and take a new --store"
        )

    def _misfit(self, image: str, why: str) -> LabelFileError:
        return LabelFileError(
            f"{self.file(image)} doesn't fit {image}: {why}; pass the images that were labelled, "
            f"in their size, or leave this one out: remove the file, and take a new --store"
        )


def folders_in(directory: Path) -> list[Path]:
    """List the folders in a folder, sorted. Raises LabelFileError."""
    if not directory.is_dir():
        raise LabelFileError(
            f"there is no folder {directory}; name the one that holds the label files"
        )
    return sorted(entry for entry in directory.iterdir() if entry.is_dir())


def size_of(file: Path) -> int:
    """Return a label file's size in bytes; -1 if there is none. Raises DataError if the
    disk doesn't tell now: an image without labels is left out for ever."""
    found = status(file)
    if found is None:
        return -1
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise LabelFileError(f"{file} is no ordinary file; remove it")
    return found.st_size
