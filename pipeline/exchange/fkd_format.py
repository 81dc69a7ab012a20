"""Read and write FKD's label files (Shen and Xing, arXiv 2112.01528;
github.com/szq0214/FKD).

There is a file for each photograph, with crops, flips and labels of all its views. The
file is torch.save of [coords, flips, labels]. coords are float [n, 4]: top, left,
height and width of each crop, as fractions of the image's height and width. flips are
bool [n]. The form of the labels depends on their kind. With p the mean softmax of each
crop:

    full                     float [n, classes]   p
    marginal_smoothing_kK    float [n, 2, K]      the K likeliest classes and their
                                                  probabilities; the rest is even
                                                  over the others (K is 5 or 10)
    marginal_renorm_kK       float [n, 2, K]      the same file; the rest is nothing,
                                                  and the K are scaled to sum to one
    smoothing                float [n, 2]         as marginal_smoothing, with one class
    hard                     int [n]              the likeliest class alone

In other people's files the tensors may be numpy arrays, since FKD's own generator saves
numpy arrays.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from cache.errors import MealError
from pipeline.images.patience import DataError, patiently
from pipeline.models.stand_ins import StandIn

SUM = 5e-3  # excess of a label's sum above 1 that the rounding of half precision explains
KINDS = {"full": 0, "top5": 5, "top10": 10}  # classes kept in a written label; 0: all


class LabelFileError(MealError):
    """A foreign label file, or set of label files, that is damaged or not as it should
    be."""


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
    try:
        _require_uncompressed(path, size)
        return size, torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as error:  # of what the file says
        raise ValueError(f"it needs more memory than there is {error}") from None


def read(path: Path, classes: int) -> LabelFile:
    """Read a label file. Only tensors are read, and nothing in the file is executed.
    Raises LabelFileError."""
    try:
        size, content = patiently(lambda: _load(path), path)
    except DataError:  # the disk doesn't answer now, which says nothing about the file
        raise
    except Exception as error:  # zip, unpickling and I/O errors mean the same to a user
        said = " ".join(str(error).split())
        why = (
            "it is damaged, or holds more than tensors, which may be a program"
            if "Weights only load failed" in said
            else said[:120]
        )
        raise LabelFileError(
            f"{path} can't be read ({why}); get it anew from where it came from"
        ) from None
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


def _require_uncompressed(path: Path, size: int) -> None:
    """Raise ValueError for a zip file that holds more than its own size, which torch
    never writes: a zip bomb."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            if (
                any(one.compress_type != zipfile.ZIP_STORED for one in packed.infolist())
                or sum(one.file_size for one in packed.infolist()) > size
            ):
                raise ValueError("it is compressed, as torch never writes it")


def _foreign(path: Path, why: str) -> LabelFileError:
    return LabelFileError(
        f"{path} is no label file of FKD ({why}); name the folder of one label set of these classes"
    )


def kind_of(labels: np.ndarray, classes: int) -> str | None:
    """Return the kind of label that an array holds; None if it holds no kind."""
    shape = labels.shape[1:]
    if (
        labels.dtype.kind == "f"
        and shape == (2,)
        and classes == 2
        and (labels[:, 0] == np.rint(labels[:, 0])).all()
    ):
        return None  # either the likeliest class and its probability, or two probabilities
    if labels.dtype.kind == "f" and shape == (classes,):
        return "full"
    if labels.dtype.kind == "f" and len(shape) == 2 and shape[0] == 2 and 1 <= shape[1] <= classes:
        return f"marginal_smoothing_k{shape[1]}"
    if labels.dtype.kind == "f" and shape == (2,):
        return "smoothing"
    whole = labels.dtype.kind in "iu" or (
        # the generator's half precision makes floats of class numbers, too
        labels.dtype.kind == "f" and (labels == np.rint(labels)).all()
    )
    return "hard" if shape == () and whole else None


def renamed(kind: str, rest: str) -> str:
    """Return the kind of labels whose rest is "even", or "none": FKD writes the same
    files for both, and the reader has to know."""
    if rest == "even":
        return kind
    k = {"smoothing": "1"}.get(kind, kind.removeprefix("marginal_smoothing_k"))
    return f"marginal_renorm_k{k}" if k != kind else kind


def dense(labels: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """Expand labels of a kind to float32 [n, classes], rows summing to one.

    Raises ValueError, with the reason, for labels that are no probabilities of these
    classes.
    """
    if kind == "full":
        return _scaled(labels.astype(np.float32))
    n = len(labels)
    ids, p = (
        (labels[:, None], np.ones((n, 1)))
        if kind == "hard"
        else (labels.reshape(n, 2, -1)[:, 0], labels.reshape(n, 2, -1)[:, 1])
    )
    if labels.dtype == np.float16 and classes > 2048:
        raise ValueError("half precision rounds class numbers above 2,048")
    index = ids.astype(np.int64)
    if not (
        np.isfinite(ids).all()
        and (index == ids).all()
        and (index >= 0).all()
        and (index < classes).all()
    ):
        raise ValueError(f"class numbers that are not from 0 to {classes - 1}")
    if any(len(set(row)) < len(row) for row in index.tolist()):
        raise ValueError("a class that is named twice")
    p = p.astype(np.float32)
    rest = 1 - p.sum(axis=1, keepdims=True)
    if not (np.isfinite(p).all() and (p >= 0).all() and (rest >= -SUM).all()):
        raise ValueError("probabilities below zero, or whose sum is above one")
    if kind.startswith("marginal_renorm"):
        rest, total = np.zeros_like(rest), p.sum(axis=1, keepdims=True)
        if not (total > 0).all():
            raise ValueError("a label without any probability")
        p = p / total
    out = np.repeat(np.maximum(rest, 0) / max(1, classes - index.shape[1]), classes, axis=1).astype(
        np.float32
    )
    np.put_along_axis(out, index, p, axis=1)
    return _scaled(out)


def _scaled(p: np.ndarray) -> np.ndarray:
    total = p.sum(axis=1, keepdims=True)
    if not (np.isfinite(p).all() and (p >= 0).all() and (np.abs(total - 1) < 2 * SUM).all()):
        raise ValueError("probabilities below zero, or whose sum is not one")
    return p / total


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


def sparse(p: np.ndarray, kept: int) -> np.ndarray:
    """Return probabilities float32 [n, classes] in the form that a label file holds.

    kept: the number of classes to keep. Returns float32 [n, 2, kept], the likeliest
    classes and their probabilities, the likeliest first. With 0, returns the
    probabilities as they are.
    """
    if kept == 0:
        return p
    # Partitioning takes a tenth of the time of sorting all classes.
    index = np.argpartition(-p, kept - 1, axis=1)[:, :kept]
    order = np.argsort(-np.take_along_axis(p, index, axis=1), axis=1, kind="stable")
    index = np.take_along_axis(index, order, axis=1)
    return np.stack([index.astype(np.float32), np.take_along_axis(p, index, axis=1)], axis=1)


def write(file: IO[bytes], coords: np.ndarray, flips: np.ndarray, labels: np.ndarray) -> None:
    """Save one image's crops as FKD's code reads them. Tensors are saved, since today's
    torch.load reads tensors without being told to trust a pickle."""
    torch.save([torch.from_numpy(coords), torch.from_numpy(flips), torch.from_numpy(labels)], file)


# Endings of files that torchvision's ImageFolder, and so FKD's code, takes for images.
LISTED = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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


def in_order(paths: np.ndarray) -> list[str]:
    """Return those paths CLASS/…/NAME that torchvision's ImageFolder takes for images,
    in its order: by class, then by folder, then by name."""
    images = [path for path in paths.tolist() if path.lower().endswith(LISTED)]
    return sorted(images, key=lambda path: (path.split("/")[0], *path.rpartition("/")[::2]))


def require_a_name(split: str) -> None:
    """Raise LabelFileError unless ``split`` is the name of a folder, not a path."""
    if not split or "/" in split or split in (".", ".."):
        raise LabelFileError(
            f"--split is {split!r}; it must be the name of a folder of --data, like train"
        )
