"""Refuse places for results that lie among images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cache.format.manifest import Images
from pipeline.images.data_set import DataSet
from pipeline.images.names import is_hidden, on_disk
from pipeline.images.patience import DataError, is_folder, listed

PROBES = 3  # images by which a manifest's folder is known


def require_outside(option: str, path: Path | None, *several: DataSet) -> None:
    """Raise DataError if a result would be written among images, where it would be a
    class or an image at the next start.

    option: the option that names the result. path: of the result, which need not exist.
    several: the data sets. A list, and tar or parquet files, name their images, so
    results may lie beside them.
    """
    for data in several:
        if data.source.in_folders:
            require_outside_folders(option, path, [data.path])


def require_outside_folders(option: str, path: Path | None, folders: Iterable[Any]) -> None:
    """Raise DataError if a result would be written among the images of folders. A
    hidden name is never looked at. A class folder may be a link to a folder elsewhere,
    where a result would be an image too."""
    if path is None:
        return
    place = Path(os.path.realpath(path))
    for folder in (one for top in folders for one in (top, *_linked(top))):
        root = Path(os.path.realpath(folder))
        if place == root or (
            root in place.parents and not any(map(is_hidden, place.relative_to(root).parts))
        ):
            raise DataError(
                f"{option} {path} lies in {folder}, among the class folders, and would be taken "
                f"for one of them; choose a place outside of it"
            )


def _linked(folder: Path) -> list[Path]:
    """Return the links to folders in a folder; none if there is no such folder yet."""
    try:
        return [Path(e.path) for e in listed(folder) if e.is_symlink() and is_folder(e)]
    except OSError:
        return []


def require_no_split(option: str, path: Path | None, data: DataSet) -> None:
    """Raise DataError if a result that doesn't exist yet would be written in train/ or
    val/ of the folder that the user named, or as one of them. Training would take the
    result's folders for class folders."""
    divided = data.source.in_folders and data.root not in (None, data.path)
    if path is not None and divided and not path.exists():
        require_outside_folders(option, path, [data.root / s for s in ("train", "val")])


def require_elsewhere(option: str, path: Path, images: Images | Sequence[str]) -> None:
    """Raise DataError if a result would be written among the images of a manifest
    (``require_outside``), wherever they lie. images: the manifest, or its paths."""
    paths = images.path[images.usable].tolist() if isinstance(images, Images) else list(images)
    probes = paths[:: max(1, len(paths) // PROBES)][:PROBES]
    place = Path(os.path.realpath(path))
    for root in (place, *place.parents):
        if any((root / on_disk(probe)).is_file() for probe in probes):
            require_outside_folders(option, path, [root])
