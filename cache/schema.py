"""What a label store is: its arrays, attributes, sizes and completion records, and how an empty one comes into being.

A store is a Zarr v3 group. Arrays, with their dimensions:

    labels   view, image, class   codes of the mean softmax (cache.codec)
    boxes    view, image, 4       int32 top, left, height, width of the crop, in pixels of the decoded image
    flips    view, image          bool, mirrored left-right after the crop
    mix_partner, mix_box          with CutMix only, see CROP_ARRAYS
    tail     view, image          with some codecs only: the mass of the classes that are coded as zero
    images/… image                path, bytes, digest, height, width, class_index, status, reason
    records  view, shard, byte    completion records, one file each; a shard without one does not exist for a reader

Zarr reads what was never written as zeros. So a shard (all rows of one shard, in one view) counts only once its record is there, and the
record is written after the shard's data has reached the disk.

Nothing in a store is believed unseen. Shards are bound to their place by the digests in their records, the manifest (images/) by its digest in the
provenance, its order by the attribute ``row_order``, and every zarr.json by the attribute ``seal``. What has no digest of its own is the number of views, the attribute ``views``: it is sealed too,
and counts where an array's own length says otherwise (after a growth that was stopped half way).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache.claims import alive
from cache.disk import make_folder, replace_file, sync_folder, sync_tree

FORMAT = "meal-v2-label-store"
VERSION, IMPORTED, ON_GPU = 3, 4, 5  # what is made now (format_version)
# What can be read: 2 brought CutMix, 3 the seal, 4 labels from others, of whose making less is known, 5 TF32 and the hardware decoder of GPUs.
VERSIONS = (1, 2, 3, 4, 5)
SEALED = 3

# What is kept per crop beside its label: dtype, and the names of an entry's own dimensions (edge: 4).
CROP_ARRAYS = {
    "boxes": ("int32", ("edge",)),
    "flips": ("bool", ()),
    "mix_partner": ("int32", ()),  # row whose crop of the same view is pasted in; -1: none is
    "mix_box": ("float32", ("edge",)),  # top, left, bottom, right of the pasted rectangle, as fractions of the output's height and width
    "tail": ("uint8", ()),  # belongs to the label: cache.codec
}
UNMIXED = ("boxes", "flips")

FORGOTTEN = 86_400.0  # seconds after which an unfinished store of another machine is nobody's

USABLE, UNUSABLE = 0, 1  # values of images/status

RECORD = np.dtype(
    [
        ("magic", "S4"),
        ("view", "<u4"),
        ("shard", "<u4"),
        ("labelled", "<u4"),  # rows of the shard that hold a label; the others are unusable images
        ("agreeing", "<u4"),  # of those, rows whose largest probability is that of the image's class folder
        ("entropy", "<f8"),  # sum over the labelled rows of the entropy of the decoded label, in nats
        ("stored_bytes", "<u8"),  # size of the shard's file of labels
        ("digest", "u1", (32,)),  # sha256, see shard_digest
    ]
)
RECORD_MAGIC = b"MLR1"

LARGEST_DOCUMENT, DEEPEST_DOCUMENT = 1 << 26, 50  # bytes and levels of a zarr.json
CHUNK_BYTES = 1 << 20  # an inner chunk is the power of two of rows nearest below this size
SHARD_CHUNKS = 32
SMALLEST_SHARD = 256  # rows
SHARDS_OF_A_SMALL_SET = 16
LOOKS = 16  # looks for a file at a time: on a network's file system each may take a millisecond


def printable(text: str) -> str:
    """The text with what isn't printable written as an escape: names of files may hold line breaks and codes that a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)


class MealError(Exception):
    """Something a user can mend. The message is one line: what, the value, the repair."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StoreError(MealError):
    """A label store that is missing, damaged, unfinished, or made from something else than what it is used with."""


class DamagedStore(StoreError):
    """A store whose own description (a zarr.json, the manifest) is not what was written. ``generate-labels`` can make that anew.

    file: which, relative to the store. fault: what is wrong with it; by default the message.
    """

    def __init__(self, message: str, file: str = "zarr.json", fault: str | None = None) -> None:
        super().__init__(message)
        self.file, self.fault = file, fault or message


class UnreadableStore(StoreError):
    """What can't be read for the moment, for want of memory or permission or of a disk that answers: no reason to call it damaged."""


LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # what no waiting mends


def momentary(error: BaseException) -> bool:
    """Whether an error of reading tells nothing of what is there."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None and error.errno not in LASTING)


def unreadable(path: Path, file: object, error: BaseException) -> UnreadableStore:
    why = " ".join(str(error).split())[:160] or type(error).__name__
    return UnreadableStore(
        f"{file} of {path} can't be read now ({why}); mend that, or remove the file if it stays so, and run the same command again"
    )


@dataclass(frozen=True)
class Images:
    """The manifest: every file of the data set's class folders, in the store's row order. All arrays are [images]."""

    path: np.ndarray  # str, relative to the data root, with forward slashes
    bytes: np.ndarray  # int64, size of the file
    digest: np.ndarray  # uint8 [images, 32], sha256 of the file
    height: np.ndarray  # int32, pixels of the decoded image; 0 where unusable
    width: np.ndarray  # int32
    class_index: np.ndarray  # int32; -1 where the folders say nothing
    status: np.ndarray  # uint8, USABLE or UNUSABLE
    reason: np.ndarray  # str, why it is unusable; empty where usable

    def __len__(self) -> int:
        return len(self.path)

    @property
    def usable(self) -> np.ndarray:
        """int64 [usable images]: the rows that have labels."""
        return np.flatnonzero(self.status == USABLE)

    @property
    def by_path(self) -> np.ndarray:
        """int64 [images]: the rows in the order of their paths. Python sorts strings twice as fast as numpy does."""
        return np.array(sorted(range(len(self)), key=self.path.tolist().__getitem__), np.int64)

    @property
    def order(self) -> str:
        """Hex sha256 over the paths in row order: which image a row is of."""
        return hashlib.sha256("\0".join(self.path.tolist()).encode()).hexdigest()

    def take(self, rows: np.ndarray) -> Images:
        return Images(*(getattr(self, field.name)[rows] for field in fields(self)))

    def manifest_digest(self) -> str:
        """Hex sha256 over every field, independent of the row order."""
        order = self.by_path
        h = hashlib.sha256()
        for field in fields(self):
            column = getattr(self, field.name)[order]
            h.update(field.name.encode())
            h.update("\0".join(column.tolist()).encode() if column.dtype.kind in "OUT" else np.ascontiguousarray(column).tobytes())
        return h.hexdigest()


def canonical_digest(document: dict) -> bytes:
    """sha256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).digest()


def crop_arrays(provenance: dict) -> tuple[str, ...]:
    """Names of the arrays that say what a crop of a store of this provenance is, in the order of CROP_ARRAYS."""
    crops = provenance.get("crops") if isinstance(provenance, dict) else None
    return (*UNMIXED, "mix_partner", "mix_box") if isinstance(crops, dict) and crops.get("cutmix") else UNMIXED


def shard_arrays(attributes: dict) -> tuple[str, ...]:
    """Names of all arrays that have a file per shard, but for its record, in a store of these attributes."""
    codec = attributes.get("codec")
    return ("labels", *crop_arrays(attributes.get("provenance")), *(["tail"] if isinstance(codec, dict) and codec.get("tail") else []))


def architecture(name: str) -> str:
    """A timm name without its tag."""
    return name.partition(".")[0] if ":" not in name else name


def format_version(provenance: dict) -> int:
    """Return the format version of a store of this provenance: the lowest version whose readers know everything that the provenance names."""
    on_gpu = provenance.get("renderer", {}).get("backend") == "gpu-hardware" or provenance["compute"].get("precision") == "tf32"
    own = [ON_GPU] * on_gpu + [IMPORTED] * ("imported" in provenance)
    return max([VERSION, *own, *map(format_version, provenance.get("merged", ()))])


def first_difference(where: str, theirs: object, ours: object) -> tuple[str, object, object] | None:
    """Where two documents differ first, and the values there."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{where}.{key}".lstrip("."), theirs.get(key), ours.get(key)) for key in theirs | ours]
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
    """sha256 over the store's provenance digest, view and shard as little-endian uint32, then the shard's rows of
    ``shard_arrays`` as little-endian bytes in C order: a shard of another store or of another place does not pass for this one."""
    h = hashlib.sha256(store_id)
    h.update(np.array([view, shard], "<u4").tobytes())
    for array in content:
        h.update(np.ascontiguousarray(array).data)
    return h.digest()


def shard_rows_for(images: int, classes: int, itemsize: int) -> tuple[int, int]:
    """(rows of an inner chunk, rows of a shard), both powers of two.

    A chunk is near 1 MiB and a shard 32 of them, which makes ImageNet × 180 views some 7,000 shards. A small data set gets smaller shards, so
    that several workers find work and a kill costs little.
    """
    chunk = 1 << max(0, (CHUNK_BYTES // (classes * itemsize)).bit_length() - 1)
    small = max(SMALLEST_SHARD, 1 << (max(1, images // SHARDS_OF_A_SMALL_SET) - 1).bit_length())
    shard = min(chunk * SHARD_CHUNKS, small)
    return min(chunk, shard), shard


def array(group: zarr.Group, name: str) -> zarr.Array:
    """An array of the store with ``write_empty_chunks`` on, which Zarr doesn't keep: without it a chunk of zeros is not written at all."""
    return group[name].with_config({"write_empty_chunks": True})


def create(path: Path, *, images: Images, views: int, attributes: dict) -> bool:
    """Make an empty store at ``path``: in a folder beside it, synced, then renamed, so that a store is there whole or not at all.

    ``attributes`` holds ``codec``, ``class_names``, ``provenance`` and whatever else describes the store. Returns False if somebody else's store came first.
    """
    make_folder(path.parent)
    host = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.creating"):  # by a process that was killed
        *_, process, _ = left.name.split(".")
        if not left.name.startswith(f".{path.name}.{host}."):  # of another machine: it takes an hour at most
            gone = time.time() - left.stat().st_mtime > FORGOTTEN
        else:  # in a container every run may have the same number
            gone = process.isdecimal() and (int(process) == os.getpid() or not alive(int(process)))
        if gone:
            shutil.rmtree(left, ignore_errors=True)
    scratch = path.with_name(f".{path.name}.{host}.{os.getpid()}.creating")
    try:
        _fill(scratch, images, views, attributes)
        sync_tree(scratch)
        os.rename(scratch, path)
    except BaseException as error:  # a full disk, a signal
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and path.exists():
            return False
        raise
    sync_folder(path.parent)
    return True


def _fill(scratch: Path, images: Images, views: int, attributes: dict) -> None:
    """Write an empty store."""
    n, classes = len(images), len(attributes["class_names"])
    chunk_rows, shard_rows = (attributes["provenance"]["layout"][key] for key in ("chunk_rows", "shard_rows"))
    shards = -(-n // shard_rows)
    chain = [ZstdCodec(level=3), Crc32cCodec()]
    packing = [ZstdCodec(level=attributes["codec"].get("compression", 3)), Crc32cCodec()]
    always = {"write_empty_chunks": True}
    kept = shard_arrays(attributes)[1:]
    mixed = "mix_box" in kept
    group = zarr.create_group(
        str(scratch),
        zarr_format=3,
        attributes={
            "format": FORMAT,
            "format_version": format_version(attributes["provenance"]),
            "views": views,
            "how_to_read": how_to_read(attributes["codec"], mixed),
            "record_fields": [[name, RECORD[name].base.str, list(RECORD[name].shape)] for name in RECORD.names],
            "row_order": images.order,
            **attributes,
        },
    )
    group.create_array(
        "labels",
        shape=(views, n, classes),
        chunks=(1, chunk_rows, classes),
        shards=(1, shard_rows, classes),
        dtype=attributes["codec"]["dtype"],
        compressors=packing,
        dimension_names=["view", "image", "class"],
        fill_value=0,
        config=always,
    )
    for name in kept:
        dtype, dimensions = CROP_ARRAYS[name]
        tail = (4,) * len(dimensions)
        group.create_array(
            name,
            shape=(views, n, *tail),
            chunks=(1, shard_rows, *tail),
            dtype=dtype,
            compressors=chain,
            dimension_names=["view", "image", *dimensions],
            config=always,
        )
    group.create_array(
        "records",
        shape=(views, shards, RECORD.itemsize),
        chunks=(1, 1, RECORD.itemsize),
        dtype="uint8",
        compressors=[Crc32cCodec()],
        dimension_names=["view", "shard", "byte"],
        fill_value=0,
        config=always,
    )
    folder = group.create_group("images")
    for field in fields(Images):
        column = getattr(images, field.name)
        text = column.dtype.kind in "OUT"
        stored = folder.create_array(
            field.name,
            shape=column.shape,
            chunks=(min(n, 1 << 16), *column.shape[1:]),
            dtype=str if text else column.dtype,
            compressors=chain,
            dimension_names=["image", "byte"][: column.ndim],
            config=always,
        )
        stored[:] = column.astype(object) if text else column
    write_seal(scratch, read_metadata(scratch, kept))


def how_to_read(codec: dict, mixed: bool) -> str:
    return (
        MIXING
        * mixed
        + "labels[view, image] are codes q of the mean softmax of the teachers for the crop boxes[view, image] (top, left, height, width in pixels "
        "of the decoded image), mirrored left-right if flips[view, image]. Decode a row, with the numbers of the attribute codec, by: "
        + codec["formula"]
        + ". Believe a shard "
        "(rows shard*shard_rows … of one view; provenance.layout.shard_rows) only if records[view, shard] is not zero: an unwritten shard reads as zeros. Rows whose "
        "images/status is not 0 have no label. A record is the struct of record_fields, packed."
    )


MIXING = (
    "CutMix: the teachers saw the crop of boxes and flips below, resized to size x size pixels, with a rectangle of the crop of the row mix_partner[view, image] "
    "(same view, resized and mirrored as its own entries say) pasted over it at the same place: rows floor(top*size + 0.5) up to, without, floor(bottom*size + 0.5) "
    "and columns likewise from left to right, where top, left, bottom, right = mix_box[view, image]; nothing where mix_partner is -1. "
)


def read_metadata(path: Path, kept: tuple[str, ...]) -> dict[str, dict]:
    """Every zarr.json of a store as a document, by its path in the store; ``kept``: ``shard_arrays`` without labels. Raises DamagedStore."""
    names = ("", "labels", *kept, "records", "images", *(f"images/{field.name}" for field in fields(Images)))
    documents = {}
    for file in (f"{name}/zarr.json".lstrip("/") for name in names):
        try:
            documents[file] = read_document(path / file)
        except (OSError, ValueError) as error:
            if momentary(error):
                raise unreadable(path, file, error) from None
            raise damaged(path, file, "it is missing" if isinstance(error, FileNotFoundError) else f"it can't be read: {error}") from None
        if not isinstance(documents[file], dict):
            raise damaged(path, file, "it holds no description of an array or group")
    return documents


def read_document(file: Path) -> object:
    """A zarr.json. Raises ValueError if it is no JSON, no file, too large, or nested deeper than any that is written here; OSError if it can't be read."""
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_DOCUMENT:
        raise ValueError("it is no ordinary file")
    try:
        document = json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [document]
    for _ in range(DEEPEST_DOCUMENT):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ValueError("it is nested too deep")
    return document


def damaged(path: Path, file: str, why: str) -> DamagedStore:
    fault = f"not what was written there ({' '.join(why.split())[:160]})"
    return DamagedStore(
        f"{path} is damaged: {file} is {fault}; "
        "run the command that made the store (generate-labels, merge or import-labels) again, which makes the file anew, or restore it from a copy",
        file,
        f"{fault}; without it nothing can be told of the labels",
    )


def seals(documents: dict[str, dict]) -> dict[str, str]:
    """Hex sha256 of each zarr.json as a document, without what may change: the length of the view axis, the seal itself, and consolidated metadata,
    which a user may add for other tools and which is not read here."""
    digests = {}
    for file, document in documents.items():
        document = {key: value for key, value in document.items() if key != "consolidated_metadata"}
        if file == "zarr.json":
            document["attributes"] = {key: value for key, value in document.get("attributes", {}).items() if key != "seal"}
        elif "/" in file and not file.startswith("images/") and isinstance(document.get("shape"), list):
            document["shape"] = [None, *document["shape"][1:]]
        digests[file] = canonical_digest(document).hex()
    return digests


def write_seal(path: Path, documents: dict[str, dict]) -> None:
    """Put the seal of these documents into the store's own zarr.json, and that file on the disk, without consolidated metadata, which may be older."""
    whole = documents["zarr.json"]
    whole.pop("consolidated_metadata", None)
    whole["attributes"]["seal"] = seals(documents)
    replace_file(path / "zarr.json", json.dumps(whole, indent=2).encode())
