"""Find ml-dr's label files (ml_dr_format.py) of a data set's images, and read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.exchange.label_files import LISTED, LabelFileError, loaded
from pipeline.exchange.label_kinds import renamed
from pipeline.exchange.label_set import LabelSet, folders_in, size_of
from pipeline.exchange.ml_dr_format import (
    CONFIG,
    augmentations,
    file_of,
    load,
    samples_of,
    teachers_of,
    unreplayable,
)
from pipeline.images.data_set import DataSet
from pipeline.images.patience import is_file, listed


class MlDrLabels(LabelSet):
    """ml-dr's label files: a file for each number in the order of torchvision's
    ImageFolder.

    directory: the folder that holds config.pth.tar, or the folder above. rest: as of
    FkdLabels. Raises LabelFileError if the set's teachers saw more than crops and
    flips, or if there aren't as many files as images.
    """

    format = "ml-dr"

    def __init__(self, directory: Path, data: DataSet, views: int | None, rest: str) -> None:
        root = next(
            (r for r in (directory, *folders_in(directory)) if is_file(r / CONFIG)),
            None,
        )
        if root is None:
            raise LabelFileError(
                f"{directory} has no {CONFIG}, which every label set of ml-dr has; name the "
                f"folder that holds it"
            )
        super().__init__(root, len(data.class_names))
        config = loaded(root / CONFIG, load)
        try:
            seen = augmentations(config)
        except ValueError as error:
            raise self._foreign(root / CONFIG, error) from None
        if foreign := unreplayable(seen):
            raise LabelFileError(
                f"the teachers of {root} saw {foreign}, as its {CONFIG} says, and a store of "
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
            told = teachers_of(config, seen)
        except ValueError as error:
            raise LabelFileError(
                f"{root / CONFIG} can't be taken ({error}); get the set anew from where it "
                f"came from, or make labels with generate-labels"
            ) from None
        self.teachers, self.image_size = told["names"], told["size"]
        self.mean, self.std = told["mean"], told["std"]
        self.interpolation = told["interpolation"]
        paths = data.list().name
        images = _in_order(paths)
        files = _numbers(root)
        if len(images) != len(files) or not images:
            raise LabelFileError(
                f"{root} has labels of {len(files):,} images, and {data.path} holds "
                f"{len(images):,}; its files know their images by number, in the order of "
                f"torchvision's ImageFolder, so pass exactly the images that were labelled"
            )
        self.index = {image: i for i, image in enumerate(images)}
        self.files = {image: file_of(i) for image, i in self.index.items()}
        self.sizes = {image: size_of(self.file(image)) for image in images}
        boxes, _, labels = self._samples(images[0])
        self.kind = renamed(f"marginal_smoothing_k{labels.shape[2]}", rest)
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

    def _samples(self, image: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        path = self.file(image)
        content, index = loaded(path, load), self.index[image]
        try:
            return samples_of(content, index, self.mirrored, self.sizes[image])
        except ValueError as error:
            raise self._foreign(path, error) from None

    def _foreign(self, path: Path, why: object) -> LabelFileError:
        return LabelFileError(
            f"{path} is no label file of ml-dr ({why}); get it anew from where it came from"
        )


def _in_order(paths: np.ndarray) -> list[str]:
    """Return those paths CLASS/…/NAME that torchvision's ImageFolder takes for images,
    in its order: by class, then by folder, then by name."""
    images = [path for path in paths.tolist() if path.lower().endswith(LISTED)]
    return sorted(images, key=lambda path: (path.split("/")[0], *path.rpartition("/")[::2]))


def _numbers(root: Path) -> set[int]:
    """Return the numbers of the images that have a file. Raises LabelFileError unless
    they count from 0 on."""
    ending = file_of(0)[1:]
    found = {
        int(entry.name.removesuffix(ending))
        for entry in listed(root)
        if entry.name.endswith(ending) and entry.name.removesuffix(ending).isdecimal()
    }
    if missing := sorted(set(range(len(found))) - found):
        raise LabelFileError(
            f"{root} has {len(found):,} label files, and {file_of(missing[0])} is missing; "
            f"unpack the set anew"
        )
    return found
