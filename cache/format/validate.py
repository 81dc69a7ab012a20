"""Refuse a store with an impossible description, before its numbers are used.

Seals and digests show that a store is what its maker wrote. They don't show that the
maker's program was right, or meant well. A stranger's store can be sealed, and still
speak of 10⁹ views, of chunks of gigabytes, or of crops outside their image.

A description is compared with a shape, which looks like the description: a dict of keys
(a key that may be missing ends in "?"), a list of one shape for each of its items, or a
rule for a value. A shape isn't a pydantic model, since cache/ needs numpy and zarr
only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cache.errors import StoreError
from cache.format.schema import CROP_ARRAYS, RECORD, shard_arrays

MOST_VIEWS, MOST_IMAGES, MOST_CLASSES = 100_000, 1 << 31, 1 << 20
MOST_CHUNK = 1 << 30  # bytes of an array's chunk, decoded
COLUMNS = {
    "path": "string",
    "bytes": "int64",
    "digest": "uint8",
    "height": "int32",
    "width": "int32",
    "class_index": "int32",
    "status": "uint8",
    "reason": "string",
}
# the Zarr codecs that stores are made with; they run no code that a store brings along
CODECS = ("sharding_indexed", "bytes", "zstd", "crc32c", "vlen-utf8")
Rule = Callable[[Any], bool]
Shape = Rule | dict[str, Any] | list[Any]


def whole(least: int, most: int) -> Rule:
    """Make the rule of a whole number, ``least`` to ``most``."""
    return lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Rule:
    """Make the rule of a finite number, ``least`` to ``most``."""
    return lambda value: (
        type(value) in (int, float) and math.isfinite(value) and least <= value <= most
    )


def one_of(*values: object) -> Rule:
    """Make the rule of a value that is one of these."""
    return lambda value: value in values


def several(n: int | None, rule: Rule) -> Rule:
    """Make the rule of a list of ``n`` values (None: any number), each of which follows
    ``rule``."""
    return lambda value: (
        isinstance(value, list) and n in (None, len(value)) and all(map(rule, value))
    )


def text(value: Any) -> bool:
    """Return whether the value is a string."""
    return isinstance(value, str)


def sha256(value: Any) -> bool:
    """Return whether the value is a string with the length of a hex sha256."""
    return isinstance(value, str) and len(value) == 64


def true_or_false(value: Any) -> bool:
    """Return whether the value is a bool."""
    return isinstance(value, bool)


def rising(rule: Rule) -> Rule:
    """Make the rule of a pair of values that follow ``rule``, the first not above the
    second."""
    return lambda value: several(2, rule)(value) and value[0] <= value[1]


def texts(value: Any) -> bool:
    """Return whether the value is a dict of strings."""
    return isinstance(value, dict) and all(map(text, value.values()))


def class_names(value: Any) -> bool:
    """Return whether the value is a list of distinct names, 1 to ``MOST_CLASSES``."""
    return several(None, text)(value) and 0 < len(set(value)) == len(value) <= MOST_CLASSES


def digests(value: Any) -> bool:
    """Return whether the value is a dict of sha256 by image size."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(key.isdecimal() and sha256(digest) for key, digest in value.items())
    )


def never(value: Any) -> bool:
    """Refuse every value: the key must be missing."""
    return False


def or_unknown(rule: Rule) -> Rule:
    """Make the rule of a value that follows ``rule`` or is None."""
    return lambda value: value is None or rule(value)


CODEC: dict[str, Shape] = {
    "name": text,
    "dtype": one_of("uint8", "uint16", "float16", "float32"),
    "levels": number(1, 2.0**126),
    "exponent": number(1e-3, 1),
    "zero": lambda value: number(0, 1)(value) and value < 1,
    "tail?": whole(2, 255),
    "dead_zone?": number(0, 1000),
    "compression?": whole(-(1 << 17), 22),
}
COMPUTE: dict[str, Rule] = {
    "batch_size": whole(1, 65_536),
    "precision": one_of("float32", "tf32", "bfloat16", "float16"),
    "device": one_of("cpu", "cuda"),
}
UNKNOWN_COMPUTE = {key: or_unknown(rule) for key, rule in COMPUTE.items()}
IMPORTED: dict[str, Shape] = {"format": text, "labels": text}
# A store that was averaged into another. It may be an average itself.
PART: dict[str, Shape] = {
    "identity": sha256,
    "teachers": whole(1, 10_000),
    "codec": CODEC,
    "compute": UNKNOWN_COMPUTE | {"compile?": one_of(True)},
    "imported?": IMPORTED,
    "gpu?": text,
}
PART["merged?"] = [PART]


def shape_of_attributes(imported: bool) -> dict[str, Shape]:
    """Return the shape of a store's attributes. With ``imported`` labels, some values
    may be unknown (None)."""
    known = or_unknown if imported else (lambda rule: rule)
    provenance: dict[str, Shape] = {
        "crops": {
            "scale": known(rising(number(1e-9, 1))),
            "ratio": known(rising(number(1e-9, 1e9))),
            "flip": known(number(0, 1)),
            "seed": whole(0, 2**64 - 1),
            "interpolation": one_of("bilinear", "bicubic"),
            "exif": one_of("ignore", "apply"),
            "cutmix?": {"prob": number(1e-9, 1), "beta": number(1e-9, 100)},
            "views?": never,  # The number of views grows, so it is no part of the recipe.
        },
        "renderer": {
            "backend": one_of("cpu", "gpu", "gpu-hardware"),
            "resize?": one_of("pillow"),
        },
        "codec": CODEC,
        "compute": {
            **(UNKNOWN_COMPUTE if imported else COMPUTE),
            "compile?": one_of(True),
        },
        "data": {"manifest": sha256},
        "layout": {"chunk_rows": whole(1, MOST_IMAGES), "shard_rows": whole(1, MOST_IMAGES)},
        "teachers": [
            {
                "model": text,
                "weights": known(sha256),
                "image_size": known(whole(8, 4096)),
                "mean": known(several(3, number(0, 1))),
                "std": known(several(3, number(1e-6, 1e3))),
                "files?": sha256,
                "entry?": text,
            }
        ],
        "imported?": IMPORTED,
        "merged?": [PART],
    }
    return {
        "class_names": class_names,
        "codec": CODEC,
        "provenance": provenance,
        "views?": whole(1, MOST_VIEWS),
        "row_order?": sha256,
        "made_with?": texts,
        "fingerprint?": {
            "rows": several(None, whole(0, MOST_IMAGES)),
            "boxes": several(None, several(4, whole(0, MOST_IMAGES))),
            "flips": several(None, true_or_false),
            "digests": digests,
        },
    }


def require_sense(
    path: object, attributes: dict[str, Any], documents: dict[str, dict[str, Any]]
) -> None:
    """Raise StoreError for the first attribute, or the first description of an array
    (``read_metadata``), that no store could have."""

    def nonsense(what: str, value: object) -> StoreError:
        return StoreError(
            f"{path} says of itself what can't be: {what} is {value!r:.80}; don't use this store, "
            f"or generate a new one"
        )

    if broken := broken_attribute(attributes):
        raise nonsense(*broken)
    codec, layout = attributes["codec"], attributes["provenance"]["layout"]
    if codec != attributes["provenance"]["codec"]:
        raise nonsense("codec, which is not the provenance's,", codec)
    coarse = not codec["dtype"].startswith("float")
    if (coarse and codec["levels"] > np.iinfo(codec["dtype"]).max) or (codec["zero"] == 0) != (
        "tail" in codec
    ):
        raise nonsense("codec", {key: codec[key] for key in ("dtype", "levels", "zero")})
    if layout["shard_rows"] % layout["chunk_rows"]:
        raise nonsense("provenance.layout", layout)
    for name, wanted in _arrays(attributes, documents).items():
        found = documents[f"{name}/zarr.json"]
        shape: Any = found.get("shape")
        want = wanted["shape"]
        if (
            not several(len(want), whole(0, MOST_IMAGES))(shape)
            or shape[1:] != want[1:]
            or (name.startswith("images/") and shape != want)
        ):
            raise nonsense(f"the shape of {name}", shape)
        if shape[0] > MOST_VIEWS and not name.startswith("images/"):
            raise nonsense(f"the number of views of {name}", shape[0])
        if found.get("data_type") != wanted["data_type"]:
            raise nonsense(f"the data type of {name}", found.get("data_type"))
        grid = {"name": "regular", "configuration": {"chunk_shape": wanted["chunks"]}}
        if found.get("chunk_grid") != grid:
            raise nonsense(f"the chunk grid of {name}", found.get("chunk_grid"))
        if not _known(found.get("codecs")):
            raise nonsense(f"codecs of {name}", found.get("codecs"))


def broken_attribute(attributes: dict[str, Any]) -> tuple[str, object] | None:
    """Find the first attribute that no store could have, and its value; None if there
    is none."""
    provenance: Any = attributes.get("provenance")
    imported = isinstance(provenance, dict) and "imported" in provenance
    if broken := first_broken(attributes, shape_of_attributes(imported)):
        return broken
    if not imported:
        return None
    drawn = [provenance["crops"].get(key) for key in ("scale", "ratio", "flip")]
    if not text(provenance["crops"].get("policy")) or len({value is None for value in drawn}) > 1:
        return "provenance.crops", provenance["crops"]
    nameless = [
        teacher
        for teacher in provenance["teachers"]
        if teacher["weights"] is None and "files" not in teacher
    ]
    return ("provenance.teachers", nameless) if nameless else None


def first_broken(value: Any, shape: Shape, place: str = "") -> tuple[str, object] | None:
    """Find the first place where a document doesn't have this shape, and the value
    there; None if there is none. A section or a list of sections must not be empty."""
    if isinstance(shape, dict):
        if not isinstance(value, dict) or not value:
            return place, value
        for key, inner in shape.items():
            name = key.removesuffix("?")
            where = f"{place}.{name}".lstrip(".")
            if name in value:
                if broken := first_broken(value[name], inner, where):
                    return broken
            elif name == key:
                return where, None
        return None
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return place, value
        found = (first_broken(item, shape[0], f"{place}.*") for item in value)
        return next((broken for broken in found if broken), None)
    return None if shape(value) else (place, value)


def _arrays(
    attributes: dict[str, Any], documents: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return shape, chunks and data type of every array, as they follow from the
    attributes and the number of images."""
    shape: Any = documents["images/path/zarr.json"].get("shape")
    n = shape[0] if several(1, whole(1, MOST_IMAGES))(shape) else 0
    layout, classes, views = (
        attributes["provenance"]["layout"],
        len(attributes["class_names"]),
        attributes.get("views", 0),
    )
    rows = layout["shard_rows"]
    arrays = {"labels": ([views, n, classes], [1, rows, classes], attributes["codec"]["dtype"])}
    for name in shard_arrays(attributes)[1:]:
        dtype, dimensions = CROP_ARRAYS[name]
        more = [4] * len(dimensions)
        arrays[name] = ([views, n, *more], [1, rows, *more], dtype)
    arrays["records"] = ([views, -(-n // rows), RECORD.itemsize], [1, 1, RECORD.itemsize], "uint8")
    for name, dtype in COLUMNS.items():
        more = [32] if name == "digest" else []
        arrays[f"images/{name}"] = ([n, *more], [min(n, 1 << 16), *more], dtype)
    return {
        name: dict(zip(("shape", "chunks", "data_type"), of, strict=True))
        for name, of in arrays.items()
    }


def _known(codecs: object) -> bool:
    """Return whether a chain of Zarr codecs holds only codecs that stores are made
    with."""
    if not isinstance(codecs, list) or not codecs:
        return False
    for codec in codecs:
        if not isinstance(codec, dict) or codec.get("name") not in CODECS:
            return False
        if codec["name"] == "sharding_indexed":
            inner: Any = codec.get("configuration")
            if (
                not isinstance(inner, dict)
                or not _known(inner.get("codecs"))
                or not _known(inner.get("index_codecs"))
            ):
                return False
            if (
                not several(None, whole(1, MOST_IMAGES))(inner.get("chunk_shape"))
                or math.prod(inner["chunk_shape"]) > MOST_CHUNK
            ):
                return False
    return True
