"""Find the label files of a folder that belong to a data set's images, and read them:
FKD's (fkd_format.py) and ml-dr's (ml_dr.py)."""

from __future__ import annotations

import hashlib
import json
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.format.validate import MOST_VIEWS
from pipeline.exchange import fkd_format, ml_dr
from pipeline.exchange.fkd_format import SPLITS, LabelFileError, named
from pipeline.images.folders import DataFolder
from pipeline.images.listing import list_files
from pipeline.images.names import as_text, is_hidden, is_system_folder
from pipeline.images.patience import (
    DataError,
    is_file,
    is_folder,
    is_there,
    listed,
    patiently,
    read_file,
    status,
)
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted, same, some

TELLING = 64  # label files whose bytes identify a label set, beside all names and sizes


class LabelSet(ABC):
    """The label files of a folder that belong to the images of a data set.

    root: the folder of the files. files: path of each image's file below ``root``.
    sizes: its size in bytes; -1 if there is none. classes: of a label. kind: of the
    labels (fkd_format.py). crops: in each file. views: of these, the number in use,
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

    @abstractmethod
    def require_classes(self, data: DataFolder) -> None:
        """Raise LabelFileError if the labels have classes that the images lack."""

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
        return fkd_format.dense(labels, self.kind, self.classes)

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


class FkdLabels(LabelSet):
    """FKD's label files: a file beside each image's name.

    directory: the folder that holds CLASS/NAME.tar, or a folder one or two levels
    above. rest: ``fkd_format.renamed``. Raises LabelFileError if no image has a file.
    """

    format, interpolation = "fkd", "bicubic"

    def __init__(
        self, directory: Path, split: str, data: DataFolder, views: int | None, rest: str
    ) -> None:
        paths, _, _, _ = list_files(data)
        places = named(paths, split, fkd_format.generated)
        root, self.below = _root_of(directory, split, list(places))
        super().__init__(root, len(data.class_names))
        if root != directory:
            say(f"label files are looked for in {root}")
        self.split, self.rest = split, rest
        self.sizes = {image: self._find(image) for image in places.values()}
        there = [image for image in sorted(self.files) if self.labelled(image)]
        if not there:
            raise LabelFileError(
                f"{directory} has no label file for any of the {len(paths):,} images of "
                f"{data.path}, like {fkd_format.generated(paths[0], split)}; "
                "name the folder that holds the class folders of label files, and the images that "
                "were labelled"
            )
        first = fkd_format.read(self.file(there[0]), self.classes)
        self.kind, self.crops, self.half = (
            fkd_format.renamed(first.kind, rest),
            len(first.coords),
            first.coords.dtype == np.float16,
        )
        self.show(views or self.crops)
        self._identify()

    def _find(self, image: str) -> int:
        """Find an image's label file, and return its size in bytes; -1 if there is
        none.

        The file is where FKD's generator puts it, or where FKD's training code looks
        for it.
        """
        for place in dict.fromkeys(
            (fkd_format.generated(image, self.split), fkd_format.place_of(image, self.split))
        ):
            self.files[image] = place.split("/", self.below)[-1]
            if (size := _size(self.file(image))) >= 0:
                return size
        return -1

    def read(
        self, image: str, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        path = self.file(image)
        found = fkd_format.read(path, self.classes)
        kind, crops = fkd_format.renamed(found.kind, self.rest), len(found.coords)
        if kind != self.kind or crops < self.views:
            raise self._other(path, kind, crops)
        try:
            boxes = fkd_format.boxes_of(found.coords[: self.views], height, width)
        except ValueError as error:
            raise self._misfit(image, str(error)) from None
        return boxes, found.flips[: self.views], found.labels[: self.views]

    def require_classes(self, data: DataFolder) -> None:
        """Raise LabelFileError if the label files have folders of classes that the
        images lack. Labels know their classes by number, so every number would mean
        another class."""
        folder = self.root if self.below else self.root / self.split
        if not is_there(folder):  # the label files lie as FKD's training code looks for them
            folder = self.root
        found = [self.files[image] for image in self.sizes if self.labelled(image)]
        used = {file.removeprefix(f"{self.split}/").partition("/")[0] for file in found}
        known = {same(name) for name in (*data.class_names, *used)}
        names = sorted(
            as_text(entry.name)
            for entry in listed(folder)
            if not (is_hidden(entry.name) or is_system_folder(entry.name)) and is_folder(entry)
        )
        if foreign := [n for n in names if same(n) not in known and n not in SPLITS]:
            raise LabelFileError(
                f"{folder} has label files of {counted(len(foreign), 'class', 'classes')} "
                f"({some(foreign)}) that {data.path} has no folder of, so the numbers of classes "
                f"would shift; pass all class folders' names, in the labels' order, as a "
                f"--class-map"
            )


class MlDrLabels(LabelSet):
    """ml-dr's label files: a file for each number in the order of torchvision's
    ImageFolder.

    directory: the folder that holds config.pth.tar, or the folder above. rest: as of
    FkdLabels. Raises LabelFileError if the set's teachers saw more than crops and
    flips, or if there aren't as many files as images.
    """

    format = "ml-dr"

    def __init__(self, directory: Path, data: DataFolder, views: int | None, rest: str) -> None:
        root = next(
            (r for r in (directory, *_folders(directory)) if is_file(r / ml_dr.CONFIG)), None
        )
        if root is None:
            raise LabelFileError(
                f"{directory} has no {ml_dr.CONFIG}, which every label set of ml-dr has; name the "
                f"folder that holds it"
            )
        super().__init__(root, len(data.class_names))
        config = self._load(root / ml_dr.CONFIG)
        try:
            seen = ml_dr.augmentations(config)
        except ValueError as error:
            raise self._foreign(root / ml_dr.CONFIG, error) from None
        if foreign := ml_dr.unreplayable(seen):
            raise LabelFileError(
                f"the teachers of {root} saw {foreign}, as its {ml_dr.CONFIG} says, and a store of "
                f"crops and flips can't replay that; take a set of crops and flips alone, like "
                f"ImageNet+-RRC, or make labels with generate-labels"
            )
        classes = config.get("num_classes")
        if classes is not None and classes != self.classes:
            raise LabelFileError(
                f"{root} has labels of {classes!r:.20} classes, and {data.path} has "
                f"{self.classes}; pass all classes, in the order of their folders' names, as a "
                f"--class-map"
            )
        self.mirrored = "random_horizontal_flip" in seen
        try:
            told = ml_dr.teachers_of(config, seen)
        except ValueError as error:
            raise LabelFileError(
                f"{root / ml_dr.CONFIG} can't be taken ({error}); get the set anew from where it "
                f"came from, or make labels with generate-labels"
            ) from None
        self.teachers, self.image_size = told["names"], told["size"]
        self.mean, self.std = told["mean"], told["std"]
        self.interpolation = told["interpolation"]
        paths, _, _, _ = list_files(data)
        images = fkd_format.in_order(paths)
        files = _numbers(root)
        if len(images) != len(files) or not images:
            raise LabelFileError(
                f"{root} has labels of {len(files):,} images, and {data.path} holds "
                f"{len(images):,}; its files know their images by number, in the order of "
                f"torchvision's ImageFolder, so pass exactly the images that were labelled"
            )
        self.index = {image: i for i, image in enumerate(images)}
        self.files = {image: ml_dr.file_of(i) for image, i in self.index.items()}
        self.sizes = {image: _size(self.file(image)) for image in images}
        boxes, _, labels = self._samples(images[0])
        self.kind = fkd_format.renamed(f"marginal_smoothing_k{labels.shape[2]}", rest)
        self.crops = len(boxes)
        self.show(views or self.crops)
        self._identify()

    def read(
        self, image: str, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes, flips, labels = (part[: self.views] for part in self._samples(image))
        k = self.kind.rpartition("k")[2]
        if str(labels.shape[2]) != k or len(boxes) < self.views:
            raise self._other(self.file(image), f"top-{labels.shape[2]}", len(boxes))
        inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] >= 1)
        inside &= boxes[:, :2] + boxes[:, 2:] <= (height, width)
        if not inside.all():
            place = int(np.argmin(inside.all(axis=1)))
            raise self._misfit(
                image, f"crop {place} is {boxes[place].tolist()}, not inside {height} × {width}"
            )
        return boxes.astype(np.int32), flips, labels

    def require_classes(self, data: DataFolder) -> None:
        """Do nothing: the constructor has compared the numbers of classes and images,
        and no file names a class."""

    def _samples(self, image: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        path = self.file(image)
        try:
            content = self._load(path)
            return ml_dr.samples_of(content, self.index[image], self.mirrored, self.sizes[image])
        except ValueError as error:
            raise self._foreign(path, error) from None

    def _load(self, path: Path) -> dict:
        try:
            return patiently(lambda: ml_dr.load(path), path)
        except DataError:  # the disk doesn't answer now, which says nothing about the file
            raise
        except ValueError as error:
            raise self._foreign(path, error) from None
        except Exception as error:  # zip, unpickling and I/O errors mean the same to a user
            why = " ".join(str(error).split())[:120]
            raise LabelFileError(
                f"{path} can't be read ({why}); get it anew from where it came from"
            ) from None

    def _foreign(self, path: Path, why: object) -> LabelFileError:
        return LabelFileError(
            f"{path} is no label file of ml-dr ({why}); get it anew from where it came from"
        )


def _folders(directory: Path) -> list[Path]:
    """List the folders in a folder, sorted. Raises LabelFileError."""
    if not directory.is_dir():
        raise LabelFileError(
            f"there is no folder {directory}; name the one that holds the label files"
        )
    return sorted(entry for entry in directory.iterdir() if entry.is_dir())


def _numbers(root: Path) -> set[int]:
    """Return the numbers of the images that have a file. Raises LabelFileError unless
    they count from 0 on."""
    ending = ml_dr.file_of(0)[1:]
    found = {
        int(entry.name.removesuffix(ending))
        for entry in listed(root)
        if entry.name.endswith(ending) and entry.name.removesuffix(ending).isdecimal()
    }
    if missing := sorted(set(range(len(found))) - found):
        raise LabelFileError(
            f"{root} has {len(found):,} label files, and {ml_dr.file_of(missing[0])} is missing; "
            f"unpack the set anew"
        )
    return found


def _root_of(directory: Path, split: str, files: Sequence[str]) -> tuple[Path, int]:
    """Find the folder that holds the label files: ``directory``, or a folder in it.

    Returns the folder, and 1 if the folder is the split's own, otherwise 0. A folder
    named after another split is never taken for the split's own, since the images of
    both may have the same names.
    """
    below = _folders(directory)
    some = files[:: max(1, len(files) // 1000)]
    for root in (directory, *below):
        for skipped in (0,) if root.name in SPLITS - {split} else (0, 1):
            if any(is_file(root / file.split("/", skipped)[-1]) for file in some):
                return root, skipped
    return directory, 0


def _size(file: Path) -> int:
    """Return a label file's size in bytes; -1 if there is none. Raises DataError if the
    disk doesn't tell now: an image without labels is left out for ever."""
    found = status(file)
    if found is None:
        return -1
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise LabelFileError(f"{file} is no ordinary file; remove it")
    return found.st_size
