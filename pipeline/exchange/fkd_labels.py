"""Find FKD's label files (fkd_format.py) of a data set's images, and read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.exchange import fkd_format
from pipeline.exchange.fkd_format import SPLITS, named
from pipeline.exchange.label_files import LabelFileError
from pipeline.exchange.label_kinds import renamed
from pipeline.exchange.label_set import LabelSet, folders_in, size_of
from pipeline.images.data_set import DataSet
from pipeline.images.names import as_text, is_hidden, is_system_folder
from pipeline.images.patience import is_file, is_folder, is_there, listed
from pipeline.runtime.progress import say
from pipeline.runtime.wording import same


class FkdLabels(LabelSet):
    """FKD's label files: a file beside each image's name.

    directory: the folder that holds CLASS/NAME.tar, or a folder one or two levels
    above. rest: ``label_kinds.renamed``. Raises LabelFileError if no image has a file.
    """

    format, interpolation = "fkd", "bicubic"

    def __init__(
        self, directory: Path, split: str, data: DataSet, views: int | None, rest: str
    ) -> None:
        paths = data.list().name
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
            renamed(first.kind, rest),
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
            if (size := size_of(self.file(image))) >= 0:
                return size
        return -1

    def read(
        self, image: str, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        path = self.file(image)
        found = fkd_format.read(path, self.classes)
        kind, crops = renamed(found.kind, self.rest), len(found.coords)
        if kind != self.kind or crops < self.views:
            raise self._other(path, kind, crops)
        try:
            boxes = fkd_format.boxes_of(found.coords[: self.views], height, width)
        except ValueError as error:
            raise self._misfit(image, str(error)) from None
        return boxes, found.flips[: self.views], found.labels[: self.views]

    def foreign_classes(self, names: Sequence[str]) -> list[str]:
        folder = self.root if self.below else self.root / self.split
        if not is_there(folder):  # the label files lie as FKD's training code looks for them
            folder = self.root
        found = [self.files[image] for image in self.sizes if self.labelled(image)]
        used = {file.removeprefix(f"{self.split}/").partition("/")[0] for file in found}
        known = {same(name) for name in (*names, *used)}
        entries = sorted(
            as_text(entry.name)
            for entry in listed(folder)
            if not (is_hidden(entry.name) or is_system_folder(entry.name)) and is_folder(entry)
        )
        return [name for name in entries if same(name) not in known and name not in SPLITS]


def _root_of(directory: Path, split: str, files: Sequence[str]) -> tuple[Path, int]:
    """Find the folder that holds the label files: ``directory``, or a folder in it.

    Returns the folder, and 1 if the folder is the split's own, otherwise 0. A folder
    named after another split is never taken for the split's own, since the images of
    both may have the same names.
    """
    below = folders_in(directory)
    some = files[:: max(1, len(files) // 1000)]
    for root in (directory, *below):
        for skipped in (0,) if root.name in SPLITS - {split} else (0, 1):
            if any(is_file(root / file.split("/", skipped)[-1]) for file in some):
                return root, skipped
    return directory, 0
