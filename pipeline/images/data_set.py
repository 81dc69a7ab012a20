"""Hold a data set: where its images lie, and the names of their classes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache.format.manifest import Images
from pipeline.images.patience import DataError
from pipeline.images.sources.opening import open_source, place_of
from pipeline.images.sources.remote.url import Url
from pipeline.images.sources.source import Classes, ImageSource, Listing
from pipeline.runtime.wording import counted, same, some


@dataclass(frozen=True)
class DataSet:
    """The images of one split, and the names of their classes.

    source: where the images lie. class_names: in the order of the models' outputs, so
    that a name's place is its class index; empty if nothing names the classes. mapped:
    True if a class map, a store or a model gave the names; otherwise the source told
    them. root: what the user named, which may hold several splits. split: the split
    that the user asked for. places: the addresses of the files of one manifest, in the
    manifest's order, if its images have other names here (``require_same_files``).
    """

    source: ImageSource
    class_names: Sequence[str]
    mapped: bool = False
    root: Path | Url | None = None
    split: str = "train"
    places: np.ndarray | None = None

    @classmethod
    def find(
        cls, data: str | Path | Url, split: str, class_map: Sequence[str] | None = None
    ) -> DataSet:
        """Find the images of a split (``open_source``). Raises DataError."""
        source = open_source(data, split)
        names = class_map or source.classes().names
        return cls(source, names, class_map is not None, place_of(data), split)

    @property
    def path(self) -> Path | Url:
        """Return the file, folder or URL that holds the split, for messages."""
        return self.source.path

    def named(self, class_names: Sequence[str], *, mapped: bool = True) -> DataSet:
        """Return the data set with these names of classes."""
        return replace(self, class_names=list(class_names), mapped=mapped)

    def told(self) -> Classes:
        """Return the classes that the source tells of, in the source's own order."""
        return self.source.classes(self.class_names)

    def list(self, known: Container[str] = (), *, every: bool = False) -> Listing:
        """List the files (``ImageSource.list``), with class indices into
        ``class_names``. Raises DataError for a class of no known name."""
        told = self.told()
        listing = self.source.list(told, known, every=every)
        # The last entry is for -1: nothing tells the class.
        index = np.append(self._indices(told), -1)[listing.class_index].astype(np.int32)
        return replace(listing, class_index=index)

    def _indices(self, told: Classes) -> np.ndarray:
        """Return the place of each told class in ``class_names``, int32 [told]."""
        known = {same(name): i for i, name in enumerate(self.class_names)}
        if told.numbered:
            if len(told.names) > len(known):
                raise DataError(
                    f"{self.path} has class numbers up to {len(told.names) - 1}, where "
                    f"{counted(len(known), 'class', 'classes')} are known; pass the --class-map "
                    f"that names them all"
                )
            return np.arange(len(told.names), dtype=np.int32)
        if foreign := [name for name in told.names if same(name) not in known]:
            noun = self.source.noun
            raise DataError(
                f"{self.path} has {counted(len(foreign), noun, plural(noun))} of no known class "
                f"({some(foreign)}), where {counted(len(known), 'class', 'classes')} "
                f"({some(self.class_names)}) are known; pass the --class-map that names them, or "
                f"take the {'folders' if noun != 'class' else 'images'} away"
            )
        return np.array([known[same(name)] for name in told.names], np.int32)

    def addresses(self, images: Images) -> np.ndarray:
        """Return the addresses of a manifest's files, in its order. Raises DataError if
        a usable image isn't there."""
        return self.source.addresses(images) if self.places is None else self.places

    def require_sound(self) -> None:
        """Require that the source is laid out as it should be (``ImageSource``). Names
        that a class map, a store or a model gave aren't doubted. Raises DataError."""
        if not self.mapped or not self.source.in_folders:
            self.source.require_sound(self.split)


def plural(noun: str) -> str:
    """Return the plural of what tells a class."""
    return noun + ("es" if noun.endswith("s") else "s")
