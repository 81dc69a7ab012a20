"""Read and write FKD's label files (Shen and Xing, arXiv 2112.01528;
github.com/szq0214/FKD).

There is a file for each photograph, with crops, flips and labels of all its views. The
file is torch.save of [coords, flips, labels]. coords are float [n, 4]: top, left,
height and width of each crop, as fractions of the image's height and width. flips are
bool [n]. The form of the labels depends on their kind (label_kinds.py).

In other people's files the tensors may be numpy arrays, since FKD's own generator saves
numpy arrays.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from pipeline.exchange.label_files import LISTED, LabelFileError, loaded, require_uncompressed
from pipeline.exchange.label_kinds import kind_of
from pipeline.models.stand_ins import StandIn


@dataclass
class LabelFile:
    """The contents of a label file: n crops of an image, with their labels."""

    coords: np.ndarray  # float [n, 4], fractions of height, width, height, width
    flips: np.ndarray  # bool [n]
    labels: np.ndarray  # shape and dtype depend on the kind
    kind: str


def place_of(image: str, split: str) -> str:
    """Return where FKD's training code looks for the labels of an image CLASS/…/NAME.

    The path is the last three parts of SPLIT/CLASS/…/NAME up to the first dot, followed
    by .tar.
    """
    return "/".join([split, *image.split("/")][-3:]).split(".")[0] + ".tar"


def generated(image: str, split: str) -> str:
    """Return where FKD's generator puts the labels of an image.

    The path differs from ``place_of`` where a folder has a dot in its name, or is
    nested.
    """
    folder, _, name = image.rpartition("/")
    return f"{split}/{folder}/{name.split('.')[0]}.tar"


class _Numpy(StandIn):
    """Stands in for the numpy objects that a pickled array asks for, so that none of
    numpy's own code reads untrusted data."""

    def array(self) -> np.ndarray:
        """Return the array that was pickled. Raises ValueError or any other error for a
        state that can't be used."""
        _, shape, kind, columns_first, raw = self.state
        code, order = kind.said[0], kind.state[1]
        if not re.fullmatch(r"[fiub][1248]", code) or order not in "<|=" or columns_first:
            raise ValueError(f"an array of kind {code!r}")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, np.dtype(code)).reshape(shape)


def _reconstruct(*said: object) -> _Numpy:
    return _Numpy(*said)


@contextmanager
def reading() -> Iterator[None]:
    """Let ``read`` read numpy arrays too, within this context. Every other object that
    a pickle asks for is still refused."""
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    known = [(_reconstruct, f"{module}._reconstruct") for module in modules]
    with torch.serialization.safe_globals(
        [*known, (_Numpy, "numpy.ndarray"), (_Numpy, "numpy.dtype"), _Numpy]
    ):
        yield


def _load(path: Path) -> tuple[int, Any]:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            require_uncompressed(packed, size)
    try:
        return size, torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as error:  # of what the file says
        raise ValueError(f"it needs more memory than there is {error}") from None
    except pickle.UnpicklingError:
        raise ValueError(
            "it is damaged, or holds more than tensors, which may be a program"
        ) from None


def read(path: Path, classes: int) -> LabelFile:
    """Read a label file. Only tensors are read, and nothing in the file is executed.
    Raises LabelFileError."""
    size, content = loaded(path, _load)
    if not isinstance(content, (list, tuple)) or len(content) != 3:
        raise _foreign(path, "it doesn't hold coords, flips and labels")
    try:
        for one in content:  # a tensor of a few bytes may claim to repeat them for ever
            if isinstance(one, torch.Tensor) and one.numel() * one.element_size() > size:
                raise ValueError(
                    f"a tensor of {one.numel():,} elements in a file of {size:,} bytes"
                )
        coords, flips, labels = (
            one.array() if isinstance(one, _Numpy) else one.numpy() for one in content
        )
    except Exception as error:  # untrusted arrays fail in many ways
        raise _foreign(
            path, f"it holds other things than tensors: {' '.join(str(error).split())[:80]}"
        ) from None
    n = len(coords) if coords.ndim else 0
    if (
        coords.shape != (n, 4)
        or n == 0
        or coords.dtype.kind != "f"
        or flips.shape != (n,)
        or labels.shape[:1] != (n,)
    ):
        raise _foreign(path, f"its shapes are {coords.shape}, {flips.shape} and {labels.shape}")
    if not np.isin(flips, (0, 1)).all():
        raise _foreign(path, "its flips are neither true nor false")
    kind = kind_of(labels, classes)
    if kind is None:
        raise _foreign(
            path,
            f"its labels are {labels.dtype} {list(labels.shape)}, which no kind of label of "
            f"{classes} classes is",
        )
    return LabelFile(coords, flips.astype(bool), labels, kind)


def _foreign(path: Path, why: str) -> LabelFileError:
    return LabelFileError(
        f"{path} is no label file of FKD ({why}); name the folder of one label set of these classes"
    )


def boxes_of(coords: np.ndarray, height: int, width: int) -> np.ndarray:
    """Convert fractions of an image's height and width, [n, 4], to pixels.

    Returns int32 [n, 4] top, left, height, width. Raises ValueError for fractions that
    are no whole pixels inside the image: the crops were then made on another size of
    this image.
    """
    scale = np.array([height, width, height, width], np.float64)
    if not np.isfinite(coords).all():
        raise ValueError("a crop without numbers")
    exact = coords.astype(np.float64) * scale
    boxes = np.rint(exact)
    # Rounding a fraction may have moved an edge by half the distance of neighbouring
    # numbers below 1, times the pixels.
    apart = np.abs(exact - boxes) > scale * float(np.finfo(coords.dtype).epsneg) / 2 + 1e-6
    outside = (
        (boxes < 0).any(axis=1)
        | (boxes[:, 2:] < 1).any(axis=1)
        | (boxes[:, :2] + boxes[:, 2:] > scale[:2]).any(axis=1)
    )
    if coords.dtype == np.float16:
        # Half precision moves a fraction by 2^-12 at most: from a side of 2,048 pixels
        # on by a pixel, from 6,144 on by two, and so on. The far edge has the errors of
        # both numbers.
        within = boxes.copy()
        within[:, 2:] = np.clip(boxes[:, 2:], 1, scale[:2])
        within[:, :2] = np.clip(boxes[:, :2], 0, scale[:2] - within[:, 2:])
        moved = np.maximum(1, 2 * np.floor(scale * 2.0**-12 + 0.5))
        outside = (np.abs(within - boxes) > moved).any(axis=1)
        boxes = within
    if apart.any() or outside.any():
        place = int(np.argmax(apart.any(axis=1) | outside))
        raise ValueError(
            f"crop {place} is {exact[place].round(2).tolist()} pixels, not whole ones inside "
            f"{height} × {width}"
        )
    return boxes.astype(np.int32)


def coords_of(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Convert boxes int [n, 4] in pixels to float32 [n, 4] fractions, which
    ``boxes_of`` reads."""
    return (boxes / np.array([height, width, height, width], np.float64)).astype(np.float32)


def write(file: IO[bytes], coords: np.ndarray, flips: np.ndarray, labels: np.ndarray) -> None:
    """Save one image's crops as FKD's code reads them. Tensors are saved, since today's
    torch.load reads tensors without being told to trust a pickle."""
    torch.save([torch.from_numpy(coords), torch.from_numpy(flips), torch.from_numpy(labels)], file)


SPLITS = {"train", "val", "test", "validation"}


def named(paths: np.ndarray, split: str, place: Callable[[str, str], str]) -> dict[str, str]:
    """Map each label file to its image, for the images that FKD's code takes for
    images.

    place: ``place_of`` or ``generated``. Raises LabelFileError if two images have the
    same label file.
    """
    taken: dict[str, str] = {}
    for image in paths.tolist():
        if not image.lower().endswith(LISTED):
            continue
        file = place(image, split)
        if file in taken:
            raise LabelFileError(
                f"FKD keeps the labels of {taken[file]} and {image} in one file, {file}, so that "
                f"those of one are lost; rename or remove one of the images"
            )
        taken[file] = image
    return taken


def require_a_name(split: str) -> None:
    """Raise LabelFileError unless ``split`` is the name of a folder, not a path."""
    if not split or "/" in split or split in (".", ".."):
        raise LabelFileError(
            f"--split is {split!r}; it must be the name of a folder of --data, like train"
        )
