"""Read the label sets of ml-dr (Faghri et al., "Reinforce Data, Multiply Impact", arXiv
2303.08983; github.com/apple/ml-dr) that hold crops and flips alone, as ImageNet+-RRC,
-RRC-Small and -RRC-Mini do.

The set is a folder. config.pth.tar says how the set was made. I.pth.tar has the labels
of image I, which is a number in the order of torchvision's ImageFolder. It is
torch.save of (I, [sample, …]), and each sample is
{"params": [(top, left, height, width), flip], "prob": (probabilities, classes)}:
the box in pixels, whether it was mirrored, and the likeliest classes. A set that wasn't
compressed has {"random_resized_crop": (box, …), "random_horizontal_flip": (flip, …), …}
in place of the list.

The files hold numbers, strings, lists and dictionaries only, in a protocol of pickle
that torch.load refuses to read as tensors only. So they are read here, by an unpickler
that knows no class and no function.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.exchange.label_files import require_uncompressed

CONFIG = "config.pth.tar"
# Augmentations that replaying a crop and a flip brings back, in ml-dr's names.
REPLAYED = {"uint8", "random_resized_crop", "random_horizontal_flip", "to_tensor", "normalize"}
MOST_PIXELS = 4096  # of an input's side
# torchvision's names and Pillow's numbers of interpolations that a store knows.
INTERPOLATIONS = {"bilinear": "bilinear", "2": "bilinear", "bicubic": "bicubic", "3": "bicubic"}
# The others, in words.
SPOKEN = {
    "rand_augment": "RandAugment",
    "random_erase": "random erasing",
    "mixup": "mixup",
    "cutmix": "CutMix",
    "resize": "a resize of the whole image",
    "center_crop": "a central crop",
    "random_crop": "a crop of fixed size",
}


def file_of(index: int) -> str:
    """Return the name of the label file of an image."""
    return f"{index}.pth.tar"


class _Plain(pickle._Unpickler):
    """Reads numbers, strings and containers, and refuses everything else.

    It is Python's unpickler in Python: a few bytes can make the one in C reserve
    gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}, which may be a program")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it holds tensors, where numbers were expected")


def load(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, if it holds numbers, strings
    and containers only. Nothing in the file is executed. Raises ValueError for other
    content, and errors of many types for a damaged file."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no file of torch.save; joblib's files can't be read safely")
    with zipfile.ZipFile(path) as packed:
        require_uncompressed(packed, path.stat().st_size)
        (name,) = [n for n in packed.namelist() if n.endswith("/data.pkl")]
        return _Plain(io.BytesIO(packed.read(name))).load()


def augmentations(config: Any) -> dict[str, dict]:
    """Return the augmentations that a set's config enables, with their settings. Raises
    ValueError for a config that isn't one of ml-dr."""
    try:
        found = config["reinforce"]["image_augmentation"]
        return {
            str(name): dict(settings or {})
            for name, settings in found.items()
            if (settings or {}).get("enable", True)
        }
    except Exception as error:
        raise ValueError(f"it doesn't say how crops were augmented ({error!r:.60})") from None


def teachers_of(config: dict, seen: dict[str, dict]) -> dict[str, Any]:
    """Return what a set's config tells about its teachers: names, image_size in pixels
    (None: unknown), mean and std of RGB (None: unknown), and the interpolation of the
    crops.

    seen: ``augmentations`` of the config. Raises ValueError, with the reason, for
    values that no teacher has.
    """
    crop, scale = seen["random_resized_crop"], seen.get("normalize", {})
    teacher = config.get("teacher") or {}
    names = teacher.get("name") or [] if isinstance(teacher, dict) else teacher
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"its teachers are named {names!r:.60}")
    size = crop.get("size")
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if size is not None and not (type(size) is int and 8 <= size <= MOST_PIXELS):
        raise ValueError(f"its crops are resized to {size!r:.60} pixels, and a store's are square")
    interpolation = INTERPOLATIONS.get(str(crop.get("interpolation", "bilinear")).lower())
    if interpolation is None:
        raise ValueError(
            f"its crops are resized with {crop['interpolation']!r:.60}, and a store's with "
            f"bilinear or bicubic interpolation"
        )
    found: dict[str, Any] = {"mean": scale.get("mean"), "std": scale.get("std")}
    for name, value in found.items():
        if value is not None and not (
            isinstance(value, (list, tuple))
            and len(value) == 3
            and all(type(one) in (int, float) for one in value)
            and all(0 <= one <= 1 if name == "mean" else 1e-6 <= one <= 1e3 for one in value)
        ):
            raise ValueError(f"its {name} is {value!r:.60}")
    return found | {"names": list(names), "size": size, "interpolation": interpolation}


def unreplayable(names: dict[str, dict]) -> str:
    """Say which augmentations crop and flip can't replay; empty if there are none."""
    foreign = [SPOKEN.get(name, name) for name in names if name not in REPLAYED]
    if not foreign and "random_resized_crop" not in names:
        return "no random crop"
    return ", ".join(foreign)


def samples_of(
    content: Any, index: int, mirrored: bool, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes int64 [n, 4], flips bool [n], and labels float64 [n, 2, k], the
    classes and their probabilities, of the content of an image's file.

    mirrored: whether the set has flips. size: of the file in bytes. Raises ValueError,
    with the reason, for other content.
    """
    if not (isinstance(content, (list, tuple)) and len(content) == 2):
        raise ValueError("it doesn't hold an image's number and its samples")
    number, samples = content
    if type(number) is not int or number != index:
        raise ValueError(f"it doesn't hold the labels of image {index}")
    if not isinstance(samples, (list, tuple)) or not samples:
        raise ValueError("it has no samples")
    try:
        crops = [_crop(one["params"], mirrored) for one in samples]
        found = [one["prob"] for one in samples]
        boxes = _table([box for box, _ in crops], 4, size)
        flips = _table([[flip] for _, flip in crops], 1, size)[:, 0]
        k = len(found[0][0])
        p, classes = (_table([one[part] for one in found], k, size) for part in (0, 1))
    except Exception:
        raise ValueError(
            "a sample isn't a crop, a flip and as many classes as probabilities"
        ) from None
    if not (boxes == np.rint(boxes)).all():
        raise ValueError("a crop isn't four whole pixels")
    if not np.isin(flips, (0, 1)).all():
        raise ValueError("its flips are neither true nor false")
    if k == 0:
        raise ValueError("its labels name no classes")
    return boxes.astype(np.int64), flips.astype(bool), np.stack([classes, p], axis=1)


def _table(rows: list, columns: int, size: int) -> np.ndarray:
    """Return rows of so many numbers as float64 [rows, columns]. Raises ValueError for
    other rows, and for more numbers than a file of ``size`` bytes can hold: a list of a
    few bytes may be in it many times."""
    plain = all(
        len(row) == columns and {int, float, bool}.issuperset(map(type, row)) for row in rows
    )
    if not plain or len(rows) * columns > size:
        raise ValueError
    return np.array(rows, np.float64).reshape(len(rows), columns)


def _crop(params: Any, mirrored: bool) -> tuple[Any, Any]:
    """Return box and flip of a sample's parameters."""
    if isinstance(params, dict):
        flip = params["random_horizontal_flip"][0] if mirrored else False
        return params["random_resized_crop"][0], flip
    box, flip = params if mirrored else (*params, False)
    return box, flip
