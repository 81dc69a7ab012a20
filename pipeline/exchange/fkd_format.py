"""FKD's label files (Shen and Xing, arXiv 2112.01528; github.com/szq0214/FKD): one a
photograph, with crops, flips and labels of all its views.

A file is torch.save of [coords, flips, labels]: coords float [n, 4], top, left, height
and width of each crop as shares of the image's height and width; flips bool [n]; labels
by kind, with the mean softmax p of n crops:

    full                     float [n, classes]   p
    marginal_smoothing_kK    float [n, 2, K]      the K likeliest classes and their
                                                  probabilities; the rest is even
                                                  over the others (K is 5 or 10)
    smoothing                float [n, 2]         the same with one class
    hard                     int [n]              the likeliest class alone

Tensors in the files of other people may be numpy's arrays, since FKD's own generator
saves such.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache.errors import MealError

SUM = 5e-3  # that a label's sum may be above 1: half precision adds up to so much
KINDS = {"full": 0, "top5": 5, "top10": 10}  # what is written: all classes, or so many


class LabelFileError(MealError):
    """A label file of others that is damaged, or not what it should be."""


@dataclass
class LabelFile:
    """What a file says of the n crops of an image."""

    coords: np.ndarray  # float [n, 4], shares of height, width, height, width
    flips: np.ndarray  # bool [n]
    labels: np.ndarray  # by kind
    kind: str


def place_of(image: str, split: str) -> str:
    """Where FKD's training looks for the labels of an image CLASS/…/NAME: the last
    three parts of SPLIT/CLASS/…/NAME, up to the first dot."""
    return "/".join([split, *image.split("/")][-3:]).split(".")[0] + ".tar"


def generated(image: str, split: str) -> str:
    """Where FKD's generator puts them: the same, but where a folder has a dot in its
    name, or is nested."""
    folder, _, name = image.rpartition("/")
    return f"{split}/{folder}/{name.split('.')[0]}.tar"


class _Numpy:
    """Stands for what pickled arrays ask for of numpy, so that none of numpy's own code
    sees what a stranger wrote."""

    def __init__(self, *said: object) -> None:
        self.said, self.state = said, ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array that was pickled. Raises ValueError, or whatever its state can't be
        used for."""
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
    """Within it, ``read`` reads numpy's arrays too. Of everything else that a pickle
    may ask for nothing is done."""
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    known = [(_reconstruct, f"{module}._reconstruct") for module in modules]
    with torch.serialization.safe_globals(
        [*known, (_Numpy, "numpy.ndarray"), (_Numpy, "numpy.dtype"), _Numpy]
    ):
        yield


def read(path: Path, classes: int) -> LabelFile:
    """Read a label file; tensors only: nothing in it is executed. Raises
    LabelFileError."""
    try:
        size = path.stat().st_size
        _require_uncompressed(path, size)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, unpickling and I/O errors alike mean the same to a user
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
        for one in content:  # a tensor of a few bytes may say that it repeats them for ever
            if isinstance(one, torch.Tensor) and one.numel() * one.element_size() > size:
                raise ValueError(
                    f"a tensor of {one.numel():,} elements in a file of {size:,} bytes"
                )
        coords, flips, labels = (
            one.array() if isinstance(one, _Numpy) else one.numpy() for one in content
        )
    except Exception as error:  # whatever a stranger's arrays can't be made into
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
    """Raises ValueError for a zip file, as torch writes them, that holds more than its
    own size: a bomb."""
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
    """Which kind of label an array is; None if it is none."""
    shape = labels.shape[1:]
    if (
        labels.dtype.kind == "f"
        and shape == (2,)
        and classes == 2
        and (labels[:, 0] == np.rint(labels[:, 0])).all()
    ):
        return None  # class and probability of the likeliest, or probabilities of two classes?
    if labels.dtype.kind == "f" and shape == (classes,):
        return "full"
    if labels.dtype.kind == "f" and len(shape) == 2 and shape[0] == 2 and 1 <= shape[1] <= classes:
        return f"marginal_smoothing_k{shape[1]}"
    if labels.dtype.kind == "f" and shape == (2,):
        return "smoothing"
    return "hard" if labels.dtype.kind in "iu" and shape == () else None


def dense(labels: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """Labels of a kind → float32 [n, classes], rows summing to one. Raises ValueError,
    saying what, where they are no probabilities of these classes."""
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
    """Shares of an image's height and width [n, 4] → int32 [n, 4] pixels: top, left,
    height, width. Raises ValueError where they are no whole pixels, so that the crops
    were those of another size of this image."""
    scale = np.array([height, width, height, width], np.float64)
    if not np.isfinite(coords).all():
        raise ValueError("a crop without numbers")
    exact = coords.astype(np.float64) * scale
    boxes = np.rint(exact)
    # Half the distance of neighbouring numbers below 1, times the pixels, is what
    # rounding may have moved an edge.
    apart = np.abs(exact - boxes) > scale * float(np.finfo(coords.dtype).epsneg) / 2 + 1e-6
    outside = (
        (boxes < 0).any(axis=1)
        | (boxes[:, 2:] < 1).any(axis=1)
        | (boxes[:, :2] + boxes[:, 2:] > scale[:2]).any(axis=1)
    )
    if (
        coords.dtype == np.float16
    ):  # an edge may have moved by a pixel where an image has more than a thousand
        within = boxes.copy()
        within[:, 2:] = np.clip(boxes[:, 2:], 1, scale[:2])
        within[:, :2] = np.clip(boxes[:, :2], 0, scale[:2] - within[:, 2:])
        outside = (np.abs(within - boxes) > 1).any(axis=1)
        boxes = within
    if apart.any() or outside.any():
        place = int(np.argmax(apart.any(axis=1) | outside))
        raise ValueError(
            f"crop {place} is {exact[place].round(2).tolist()} pixels, not whole ones inside "
            f"{height} × {width}"
        )
    return boxes.astype(np.int32)


def coords_of(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """int [n, 4] pixels → float32 [n, 4] shares, as ``boxes_of`` reads them."""
    return (boxes / np.array([height, width, height, width], np.float64)).astype(np.float32)


def sparse(p: np.ndarray, kept: int) -> np.ndarray:
    """float32 [n, classes] → the labels of a file: all of them for 0, otherwise float32
    [n, 2, kept] the likeliest classes, the first first."""
    if kept == 0:
        return p
    index = np.argpartition(-p, kept - 1, axis=1)[
        :, :kept
    ]  # a tenth of the time of sorting them all
    order = np.argsort(-np.take_along_axis(p, index, axis=1), axis=1, kind="stable")
    index = np.take_along_axis(index, order, axis=1)
    return np.stack([index.astype(np.float32), np.take_along_axis(p, index, axis=1)], axis=1)


def write(file: object, coords: np.ndarray, flips: np.ndarray, labels: np.ndarray) -> None:
    """Save one image's crops as FKD's code reads them, as tensors, which today's
    torch.load reads without being told to trust a pickle."""
    torch.save([torch.from_numpy(coords), torch.from_numpy(flips), torch.from_numpy(labels)], file)


# What torchvision's ImageFolder, and so FKD's code, takes for images.
LISTED = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train", "val", "test", "validation"}


def named(paths: np.ndarray, split: str, place: Callable[[str, str], str]) -> dict[str, str]:
    """Label file → its image, of those files that FKD's code takes for images. Raises
    LabelFileError where two would have the same."""
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
    if not split or "/" in split or split in (".", ".."):
        raise LabelFileError(
            f"--split is {split!r}; it must be the name of a folder of --data, like train"
        )
