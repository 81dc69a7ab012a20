"""Define a label store: its arrays, attributes, sizes, and completion records.

A store is a Zarr v3 group. Arrays, with their dimensions:

    labels   view, image, class   codes of the mean softmax (cache.format.codec)
    boxes    view, image, 4       int32 top, left, height, width, pixels
    flips    view, image          bool, mirrored left-right after the crop
    mix_partner, mix_box          with CutMix only, see CROP_ARRAYS
    tail     view, image          mass of the classes coded as zero; some codecs
    images/… image                the columns of the manifest (manifest.Images)
    records  view, shard, byte    completion records, one file each

A shard is a stretch of rows in one view. Zarr reads what was never written as zeros. So
a shard counts only once its record is there, and the record is written after the
shard's data has reached the disk.

Nothing in a store is trusted without a check. A shard is bound to its place by the
digest in its record, the manifest (images/) by its digest in the provenance, the
manifest's order by the attribute ``row_order``, and every zarr.json by the attribute
``seal``. The seal doesn't cover the lengths of the arrays' view axes, but it covers the
attribute ``views``. So ``views`` is the number of views that counts, if an array has
another length after a growth that was stopped half way.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import zarr

FORMAT = "meal-v2-label-store"
ENTRY = "entry"  # of a teacher: the part of a file that held its weights; for people alone
# Versions of new stores (format_version)
VERSION, IMPORTED, ON_GPU, FIXED_POINT = 3, 4, 5, 6
# Versions that can be read. 2 added CutMix, 3 the seal, 4 labels that others made (of
# whose making less is known), 5 TF32 and the hardware decoder of GPUs, 6 crops resized
# in integer arithmetic.
VERSIONS = (1, 2, 3, 4, 5, 6)
SEALED = 3  # first version with a seal

# The arrays that are kept per crop beside its label: dtype, and the names of the
# dimensions after view and image (edge: length 4).
CROP_ARRAYS = {
    "boxes": ("int32", ("edge",)),
    "flips": ("bool", ()),
    "mix_partner": ("int32", ()),  # row whose crop of the same view is pasted; -1: none
    # top, left, bottom, right of the pasted rectangle, as fractions of the output's
    # height and width
    "mix_box": ("float32", ("edge",)),
    "tail": ("uint8", ()),  # a part of the label, see cache.format.codec
}
UNMIXED = ("boxes", "flips")


RECORD = np.dtype(
    [
        ("magic", "S4"),
        ("view", "<u4"),
        ("shard", "<u4"),
        ("labelled", "<u4"),  # rows of the shard that hold a label; the others are unusable images
        # labelled rows whose top-1 class is that of the image's folder
        ("agreeing", "<u4"),
        # entropy of the decoded labels in nats, summed over the labelled rows
        ("entropy", "<f8"),
        ("stored_bytes", "<u8"),  # size of the shard's file of labels
        ("digest", "u1", (32,)),  # sha256, see shard_digest
    ]
)
RECORD_MAGIC = b"MLR1"


CHUNK_BYTES = 1 << 20  # an inner chunk is the power of two of rows nearest below this size
SHARD_CHUNKS = 32
SMALLEST_SHARD = 256  # rows
SHARDS_OF_A_SMALL_SET = 16
LOOKS = 16  # files looked for at once: a look may take a millisecond on a network file system


def canonical_digest(document: dict[str, Any]) -> bytes:
    """Return the sha256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(
        json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    ).digest()


def without_entries(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a provenance without the entries of files that the teachers' weights were
    in. Labels depend on the weights alone, which are known by their digests."""
    teachers = [
        {key: value for key, value in teacher.items() if key != ENTRY}
        for teacher in provenance["teachers"]
    ]
    return {**provenance, "teachers": teachers}


def crop_arrays(provenance: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the arrays that describe a crop in a store of this
    provenance, in the order of CROP_ARRAYS."""
    crops = provenance.get("crops") if isinstance(provenance, dict) else None
    return (
        (*UNMIXED, "mix_partner", "mix_box")
        if isinstance(crops, dict) and crops.get("cutmix")
        else UNMIXED
    )


def shard_arrays(attributes: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of all arrays with one file per shard in a store of these
    attributes, except ``records``."""
    codec = attributes.get("codec")
    return (
        "labels",
        *crop_arrays(attributes.get("provenance", {})),
        *(["tail"] if isinstance(codec, dict) and codec.get("tail") else []),
    )


def architecture(name: str) -> str:
    """Return a timm name without its tag."""
    return name.partition(".")[0] if ":" not in name else name


def format_version(provenance: dict[str, Any]) -> int:
    """Return the format version of a new store of this provenance: the lowest version,
    from ``VERSION`` on, whose readers know everything that the provenance names."""
    renderer = provenance.get("renderer", {})
    on_gpu = (
        renderer.get("backend") == "gpu-hardware"
        or provenance["compute"].get("precision") == "tf32"
    )
    own = [ON_GPU] * on_gpu + [IMPORTED] * ("imported" in provenance)
    own += [FIXED_POINT] * (renderer.get("resize") == "pillow")
    return max([VERSION, *own, *map(format_version, provenance.get("merged", ()))])


def first_difference(where: str, theirs: object, ours: object) -> tuple[str, object, object] | None:
    """Return the first place where two documents differ, and the values there; None if
    the documents are equal. The entry of a file that a teacher's weights were in is no
    difference."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [
            (f"{where}.{key}".lstrip("."), theirs.get(key), ours.get(key))
            for key in theirs | ours
            if key != ENTRY
        ]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{where}.{i}", a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True))]
    elif isinstance(theirs, list) and isinstance(ours, list) and where == "teachers":
        return where, [t["model"] for t in theirs], [t["model"] for t in ours]
    else:
        return None if theirs == ours else (where, _short(theirs), _short(ours))
    return next((found for pair in pairs if (found := first_difference(*pair))), None)


def _short(value: object) -> object:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else value


def shard_digest(store_id: bytes, view: int, shard: int, *content: np.ndarray) -> bytes:
    """Return the sha256 that binds a shard to its store and place: a shard of another
    store or place has another digest. The digest covers the store's provenance digest,
    view and shard as little-endian uint32, then the shard's rows of ``shard_arrays`` as
    little-endian bytes in C order."""
    h = hashlib.sha256(store_id)
    h.update(np.array([view, shard], "<u4").tobytes())
    for array in content:
        h.update(np.ascontiguousarray(array).data)
    return h.digest()


def shard_rows_for(images: int, classes: int, itemsize: int) -> tuple[int, int]:
    """Return (rows of an inner chunk, rows of a shard), both powers of two.

    A chunk is near 1 MiB. A shard is 32 chunks, which makes ImageNet × 180 views some
    7,000 shards. A small data set gets smaller shards, so that several workers find
    work and a kill costs little.
    """
    chunk = 1 << max(0, (CHUNK_BYTES // (classes * itemsize)).bit_length() - 1)
    small = max(SMALLEST_SHARD, 1 << (max(1, images // SHARDS_OF_A_SMALL_SET) - 1).bit_length())
    shard = min(chunk * SHARD_CHUNKS, small)
    return min(chunk, shard), shard


def array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Open an array of the store with ``write_empty_chunks`` on. Zarr doesn't keep this
    setting, and without it a chunk of zeros is not written at all."""
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise TypeError(f"{name} is a group")
    return found.with_config({"write_empty_chunks": True})


def how_to_read(provenance: dict[str, Any], mixed: bool) -> str:
    """Return the attribute ``how_to_read``, which explains the arrays to a reader
    without this project."""
    codec = provenance["codec"]
    return (
        MIXING * mixed
        + RESIZING * (provenance["renderer"].get("resize") == "pillow")
        + "labels[view, image] are codes q of the mean softmax of the teachers for the crop "
        "boxes[view, image] (top, left, height, width in pixels "
        "of the decoded image), mirrored left-right if flips[view, image]. Decode a row, with the "
        "numbers of the attribute codec, by: " + codec["formula"] + ". Believe a shard "
        "(rows shard*shard_rows … of one view; provenance.layout.shard_rows) only if records[view, "
        "shard] is not zero: an unwritten shard reads as zeros. Rows whose "
        "images/status is not 0 have no label. A record is the struct of record_fields, packed."
    )


RESIZING = (
    "The pixels that the teachers saw, byte by byte, in Pillow: image.convert('RGB').crop((left, "
    "top, left + width, top + height)).resize((size, height), filter).resize((size, size), "
    "filter), and transpose(FLIP_LEFT_RIGHT) if flips; filter is BILINEAR or BICUBIC, as "
    "provenance.crops.interpolation says; size is the image_size of each of provenance.teachers; "
    "with provenance.crops.exif apply, ImageOps.exif_transpose comes first. torch's resize of "
    "uint8 with antialias=True makes other values in some 0.3 % of the pixels, one level of 255 "
    "away, rarely two. "
)
MIXING = (
    "CutMix: the teachers saw the crop of boxes and flips below, resized to size x size pixels, "
    "with a rectangle of the crop of the row mix_partner[view, image] "
    "(same view, resized and mirrored as its own entries say) pasted over it at the same place: "
    "rows floor(top*size + 0.5) up to, without, floor(bottom*size + 0.5) "
    "and columns likewise from left to right, where top, left, bottom, right = mix_box[view, "
    "image]; nothing where mix_partner is -1. "
)
