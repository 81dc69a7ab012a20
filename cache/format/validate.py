"""Whether what a store says of itself makes sense, before anything is done with its
numbers.

Seals and digests show that a store is what its maker wrote. They don't show that its
maker's program was right, or meant well: a store of a stranger can be sealed and still
speak of 10⁹ views, of chunks of gigabytes, or of crops outside their image.
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
CODECS = (
    "sharding_indexed",
    "bytes",
    "zstd",
    "crc32c",
    "vlen-utf8",
)  # of Zarr; none runs anything that a store brings along
Rule = Callable[[Any], bool]


def whole(least: int, most: int) -> Rule:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Rule:
    return lambda value: (
        type(value) in (int, float) and math.isfinite(value) and least <= value <= most
    )


def one_of(*values: str) -> Rule:
    return lambda value: value in values


def several(n: int | None, rule: Rule) -> Rule:
    return lambda value: (
        isinstance(value, list)
        and len(value) in (n, len(value) if n is None else n)
        and all(map(rule, value))
    )


def text(value: Any) -> bool:
    return isinstance(value, str)


def sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def section(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def or_unknown(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def rising(rule: Rule) -> Rule:
    return lambda value: several(2, rule)(value) and value[0] <= value[1]


CODEC: dict[str, Rule] = {
    "name": text,
    "dtype": one_of("uint8", "uint16", "float16", "float32"),
    "levels": number(1, 2.0**126),
    "exponent": number(1e-3, 1),
    "zero": lambda value: number(0, 1)(value) and value < 1,
}
CODEC_IF_THERE: dict[str, Rule] = {
    "tail": whole(2, 255),
    "dead_zone": number(0, 1000),
    "compression": whole(-(1 << 17), 22),
}
COMPUTE: dict[str, Rule] = {
    "batch_size": whole(1, 65_536),
    "precision": one_of("float32", "tf32", "bfloat16", "float16"),
    "device": one_of("cpu", "cuda"),
}
COMPUTE_IF_THERE: dict[str, Rule] = {"compile": one_of(True)}


def within(place: str, rules: dict[str, Rule]) -> dict[str, Rule]:
    return {f"{place}.{key}": rule for key, rule in rules.items()}


def imported(value: Any) -> bool:
    return section(value) and all(text(value.get(key)) for key in ("format", "labels"))


def parts(value: Any) -> bool:
    """The stores that were averaged into one, each of which may be an average."""
    compute = {key: or_unknown(rule) for key, rule in COMPUTE.items()}
    rules = {
        "identity": sha256,
        "teachers": whole(1, 10_000),
        **within("codec", CODEC),
        **within("compute", compute),
    }
    may = {
        **within("codec", CODEC_IF_THERE),
        **within("compute", COMPUTE_IF_THERE),
        "merged": parts,
        "imported": imported,
        "gpu": text,
    }
    return (
        several(None, section)(value)
        and bool(value)
        and all(first_broken(part, rules, may) is None for part in value)
    )


# What is asked of each attribute; * stands for each of a list.
RULES: dict[str, Rule] = {
    "class_names": lambda value: (
        several(None, text)(value) and 0 < len(set(value)) == len(value) <= MOST_CLASSES
    ),
    "codec": section,
    **within("codec", CODEC),
    **{
        f"provenance{name}": section
        for name in ("", ".crops", ".renderer", ".codec", ".compute", ".data", ".layout")
    },
    "provenance.layout.chunk_rows": whole(1, MOST_IMAGES),
    "provenance.layout.shard_rows": whole(1, MOST_IMAGES),
    "provenance.data.manifest": sha256,
    **within("provenance.compute", COMPUTE),
    "provenance.renderer.backend": one_of("cpu", "gpu", "gpu-hardware"),
    "provenance.crops.scale": rising(number(1e-9, 1)),
    "provenance.crops.ratio": rising(number(1e-9, 1e9)),
    "provenance.crops.flip": number(0, 1),
    "provenance.crops.seed": whole(0, 2**64 - 1),
    "provenance.crops.interpolation": one_of("bilinear", "bicubic"),
    "provenance.crops.exif": one_of("ignore", "apply"),
    "provenance.teachers": lambda value: several(None, section)(value) and bool(value),
    "provenance.teachers.*.model": text,
    "provenance.teachers.*.weights": sha256,
    "provenance.teachers.*.image_size": whole(8, 4096),
    "provenance.teachers.*.mean": several(3, number(0, 1)),
    "provenance.teachers.*.std": several(3, number(1e-6, 1e3)),
}
# What need not be known of labels that others made.
UNKNOWN = (
    *within("provenance.compute", COMPUTE),
    *(f"provenance.crops.{key}" for key in ("scale", "ratio", "flip")),
    *(f"provenance.teachers.*.{key}" for key in ("weights", "image_size", "mean", "std")),
)
IF_THERE: dict[str, Rule] = {
    "provenance.imported": imported,
    "provenance.teachers.*.files": sha256,
    "views": whole(1, MOST_VIEWS),
    **within("codec", CODEC_IF_THERE),
    **within("provenance.compute", COMPUTE_IF_THERE),
    "row_order": sha256,
    "provenance.crops.cutmix": lambda value: (
        section(value)
        and number(1e-9, 1)(value.get("prob"))
        and number(1e-9, 100)(value.get("beta"))
    ),
    "provenance.crops.views": lambda value: (
        False
    ),  # that isn't a part of the recipe, since it grows
    "provenance.merged": parts,
    "made_with": lambda value: isinstance(value, dict) and all(map(text, value.values())),
    "fingerprint": lambda value: (
        section(value) and {"rows", "boxes", "flips", "digests"} <= set(value)
    ),
    "fingerprint.rows": several(None, whole(0, MOST_IMAGES)),
    "fingerprint.boxes": several(None, several(4, whole(0, MOST_IMAGES))),
    "fingerprint.flips": several(None, lambda value: isinstance(value, bool)),
    "fingerprint.digests": lambda value: (
        section(value) and all(key.isdecimal() and sha256(digest) for key, digest in value.items())
    ),
}


def require_sense(path: object, attributes: dict, documents: dict[str, dict]) -> None:
    """Raises StoreError for the first attribute, or description of an array
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
        shape, want = found.get("shape"), wanted["shape"]
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


def broken_attribute(attributes: dict) -> tuple[str, object] | None:
    """The first attribute of a store that no store could have, and its value."""
    provenance = attributes.get("provenance")
    if not isinstance(provenance, dict) or "imported" not in provenance:
        return first_broken(attributes, RULES, IF_THERE)
    broken = first_broken(
        attributes,
        {key: or_unknown(rule) if key in UNKNOWN else rule for key, rule in RULES.items()},
        IF_THERE,
    )
    if broken:
        return broken
    drawn = [provenance["crops"].get(key) for key in ("scale", "ratio", "flip")]
    if not text(provenance["crops"].get("policy")) or len({value is None for value in drawn}) > 1:
        return "provenance.crops", provenance["crops"]
    nameless = [
        teacher
        for teacher in provenance["teachers"]
        if teacher["weights"] is None and "files" not in teacher
    ]
    return ("provenance.teachers", nameless) if nameless else None


def first_broken(
    document: dict, rules: dict[str, Rule], if_there: dict[str, Rule]
) -> tuple[str, object] | None:
    """The first key whose rule its value breaks, and that value; None if all is
    well."""
    for key, rule in (*rules.items(), *if_there.items()):
        for value in _values(document, key.split(".")):
            if value is _ABSENT and key in if_there:
                continue
            if value is _ABSENT or not rule(value):
                return key, None if value is _ABSENT else value
    return None


def _arrays(attributes: dict, documents: dict[str, dict]) -> dict[str, dict]:
    """Shape, chunks and data type of every array, as they follow from the attributes
    and the number of images."""
    shape = documents["images/path/zarr.json"].get("shape")
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
    """Whether a chain of Zarr codecs holds those that stores are made with, and no
    others."""
    if not isinstance(codecs, list) or not codecs:
        return False
    for codec in codecs:
        if not isinstance(codec, dict) or codec.get("name") not in CODECS:
            return False
        if codec["name"] == "sharding_indexed":
            inner = codec.get("configuration")
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


_ABSENT = object()


def _values(place: object, keys: list[str]) -> list[object]:
    """What is at a key: one value, as many as the list has for a *, or none where what
    it would be in is not there."""
    if not keys:
        return [place]
    if keys[0] == "*":
        return (
            [value for item in place for value in _values(item, keys[1:])]
            if isinstance(place, list)
            else []
        )
    if not isinstance(place, dict):
        return [_ABSENT]
    return _values(place[keys[0]], keys[1:]) if keys[0] in place else [_ABSENT]
