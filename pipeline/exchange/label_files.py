"""Load label files of strangers, and say in one line what is wrong with a file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cache.errors import MealError
from pipeline.images.patience import DataError, patiently

T = TypeVar("T")
# Endings of files that torchvision's ImageFolder, and so FKD's code, takes for images.
LISTED = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class LabelFileError(MealError):
    """A foreign label file, or set of label files, that is damaged or not as it should
    be."""


def loaded(path: Path, load: Callable[[Path], T]) -> T:
    """Return what ``load`` makes of a file. Raises LabelFileError, with the reason, for
    a file that ``load`` can't read, and DataError if the disk doesn't answer now, which
    says nothing about the file."""
    try:
        return patiently(lambda: load(path), path)
    except DataError:
        raise
    except Exception as error:  # zip, unpickling and I/O errors mean the same to a user
        why = " ".join(str(error).split())[:120]
        raise LabelFileError(
            f"{path} can't be read ({why}); get it anew from where it came from"
        ) from None


def require_uncompressed(packed: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError for a zip file of ``size`` bytes that holds more than its own
    size, which torch never writes: a zip bomb."""
    parts = packed.infolist()
    if (
        any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        or sum(part.file_size for part in parts) > size
    ):
        raise ValueError("it is compressed, as torch never writes it")
