"""Read images from parquet files, as Hugging Face's data sets have them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from cache.system import durable
from cache.system.signals import check
from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.container_files import ContainerFiles, LocalFiles
from pipeline.images.sources.containers import Containers
from pipeline.images.sources.index import Contents, Row
from pipeline.images.sources.parquet_pages import BadPage, NotPlain, values
from pipeline.images.sources.told_names import class_of, safe_name
from pipeline.runtime.progress import say
from pipeline.runtime.wording import some

PARQUET = ".parquet"
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")  # names of columns
LABELS = ("label", "labels", "cls", "class", "fine_label", "target", "category")
BATCH = 64  # images that are unpacked at once
UNPACKED = ".images"  # suffix of an unpacked file


class ParquetFiles(Containers):
    """The images of parquet files: a column of structs with ``bytes`` (and ``path``),
    or of bytes; and a column of labels, whose names Hugging Face's metadata tell.

    Images that lie in a file as they are (uncompressed, encoding PLAIN, as datasets 4.6
    and later writes them) are read there. Those of other files are unpacked once into
    the user's cache folder. Needs pyarrow.
    """

    kind = "parquet file"

    def __init__(self, path: Any, files: ContainerFiles, split: str = "train") -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise DataError(
                f"{path} is of parquet files, which need pyarrow; install it: pip install pyarrow"
            ) from None
        super().__init__(path, files, split)
        self.unpacking = Lock()  # a row group in memory may take a gigabyte

    def contents_of(self, file: Path, name: Any) -> Contents:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file) as opened:
                column = _image_column(name, opened)
                told = _told(opened, column, _label_column(opened))
                try:
                    places, data = _in_place(file, opened, column), ""
                except NotPlain:
                    places, data = self._unpacked(file, name, opened, column)
        except (pa.ArrowException, BadPage, ValueError, TypeError, KeyError, OSError) as error:
            why = " ".join(str(error).split())[:120]
            raise DataError(
                f"{name} can't be read as a parquet file ({why}); get it anew, or take it out"
            ) from None
        contents = Contents(data=data)
        for i, ((title, number, label), (offset, size)) in enumerate(
            zip(told, places, strict=True)
        ):
            own = f"{name.stem}-{i:06d}"
            plain, why = safe_name(title or own)
            why = "the row holds no image" if offset < 0 else why
            contents.rows.append(Row(plain, max(offset, 0), size, number, label, why, own))
        return contents

    def prepare(self) -> None:
        if not isinstance(self.files, LocalFiles):  # known only once the files are here
            return
        packed = [
            file
            for file in self.files.names
            if not _unpacked_file(file).exists() and _is_packed(file)
        ]
        if packed:
            size = sum(file.stat().st_size for file in packed)
            place = kept.cache_folder()
            free = shutil.disk_usage(
                next(folder for folder in (place, *place.parents) if folder.exists())
            ).free
            line = (
                f"the images of {len(packed):,} of {len(self.files):,} parquet files of "
                f"{self.path} are compressed, so they are unpacked once into {place}: about "
                f"{size / 1e9:,.2f} GB, of {free / 1e9:,.1f} GB that are free"
            )
            if size > free:
                raise DataError(
                    f"{line}; make room, or name another folder in the variable {kept.VARIABLE}"
                )
            say(line)

    def _unpacked(
        self, file: Path, name: Any, opened: Any, column: str
    ) -> tuple[list[tuple[int, int]], str]:
        """Unpack a file's images into a file of their bytes, one after the other, once
        for all processes. Returns (offset, length) of each row's image, and the path of
        that file."""
        target = _unpacked_file(file)
        lengths = target.with_suffix(".npz")
        try:
            with self.unpacking:
                kept.once(
                    target,
                    lambda: target.exists() and kept.kept(lengths) is not None,
                    lambda: _write_images(opened, column, target, lengths),
                )
        except OSError as error:
            raise DataError(
                f"the images of {name} are compressed, and can't be unpacked into "
                f"{target.parent} ({error.strerror or error}); make room, or name another folder "
                f"in the variable {kept.VARIABLE}"
            ) from None
        found, at = [], 0
        for size in kept.kept(lengths)["length"].tolist():
            found.append((at, size) if size >= 0 else (-1, 0))
            at += max(size, 0)
        return found, str(target)


def _unpacked_file(file: Path) -> Path:
    """Return the place of a file's unpacked images."""
    found = os.stat(file)
    about = (os.path.realpath(file), str(found.st_size), str(found.st_mtime_ns))
    return kept.file_for("unpacked", *about).with_suffix(UNPACKED)


def _write_images(opened: Any, column: str, target: Path, lengths: Path) -> None:
    """Write the bytes of a file's images, and first each row's length, -1 for none."""
    scratch, sizes = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial"), []
    try:
        with open(scratch, "wb") as out:
            for content in _contents(opened, column):
                sizes.append(-1 if content is None else out.write(content))
                check()
        durable.sync_file(scratch)
        kept.write(lengths, {"length": np.array(sizes, np.int64)})
        os.replace(scratch, target)
        durable.sync_folder(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _contents(opened: Any, column: str) -> Iterator[bytes | None]:
    """Yield the bytes of each row's image, or None."""
    for batch in opened.iter_batches(batch_size=BATCH, columns=[column]):
        array = batch.column(0)
        for value in array.flatten()[0] if "." in column else array:
            yield value.as_py()


def _is_packed(file: Path) -> bool:
    """Return whether a file's images are compressed, or lie in a dictionary."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            column = _image_column(file, opened)
            return any(
                chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page
                for chunk in _chunks(opened, column)
            )
    except (pa.ArrowException, OSError):
        return False


def _chunks(opened: Any, column: str) -> list[Any]:
    """Return the descriptions of a column's chunks."""
    place = _place(opened, column)
    groups = opened.metadata
    return [groups.row_group(i).column(place) for i in range(groups.num_row_groups)]


def _place(opened: Any, column: str) -> int:
    schema = opened.metadata.schema
    return next(i for i in range(len(schema)) if schema.column(i).path == column)


def _in_place(file: Path, opened: Any, column: str) -> list[tuple[int, int]]:
    """Find the images of a file. Returns (offset, length) of each row's. Raises
    NotPlain if they don't lie there as they are."""
    described = opened.metadata.schema.column(_place(opened, column))
    chunks = _chunks(opened, column)
    if any(c.compression != "UNCOMPRESSED" or c.has_dictionary_page for c in chunks):
        raise NotPlain
    if described.max_repetition_level:
        raise ValueError(f"its column {column} holds several images a row")
    found: list[tuple[int, int]] = []
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for chunk in chunks:
            found += values(
                lambda offset, size: os.pread(descriptor, size, offset),
                chunk.data_page_offset,
                chunk.total_compressed_size,
                described.max_definition_level,
            )
    finally:
        os.close(descriptor)
    return found


def _image_column(name: Any, opened: Any) -> str:
    """Return the path of the column that holds the images' bytes. Raises DataError."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        several = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
        return any(is_one(kind) for is_one in several)

    found = {}
    for field in opened.schema_arrow:
        if binary(field.type):
            found[field.name] = field.name
        if pa.types.is_struct(field.type):
            inner = {
                field.type.field(i).name: field.type.field(i).type
                for i in range(field.type.num_fields)
            }
            if "bytes" in inner and binary(inner["bytes"]):
                found[field.name] = f"{field.name}.bytes"
    column = next((n for n in IMAGES if n in found), None) or (
        next(iter(found)) if len(found) == 1 else None
    )
    if column is None:
        columns = some(opened.schema_arrow.names, 6)
        raise DataError(
            f"{name} has no column of images ({columns}); one must be called image, with the "
            f"files' bytes"
        )
    return found[column]


def _features(opened: Any) -> dict[str, Any]:
    """Return what Hugging Face's metadata says of the columns."""
    try:
        found = json.loads((opened.schema_arrow.metadata or {})[b"huggingface"])
        return dict(found["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def _label_column(opened: Any) -> tuple[str, list[str]] | None:
    """Return the column of classes, with the classes' names if they are told; None if
    there is no such column."""
    features = {
        name: list(about["names"])
        for name, about in _features(opened).items()
        if isinstance(about, dict) and about.get("_type") == "ClassLabel" and about.get("names")
    }
    there = opened.schema_arrow.names
    named = [name for name in (*LABELS, *features) if name in features and name in there]
    if named:
        return named[0], features[named[0]]
    plain = next((name for name in LABELS if name in there), None)
    return (plain, []) if plain else None


def _told(
    opened: Any, column: str, label: tuple[str, list[str]] | None
) -> list[tuple[str, int, str]]:
    """Return (name or empty, class number or -1, class name or empty) of each row's
    image."""
    top = column.partition(".")[0]
    has_path = "." in column and "path" in {
        field.name for field in opened.schema_arrow.field(top).type
    }
    names = [f"{top}.path"] if has_path else []
    table = opened.read(columns=[*names, *([label[0]] if label else [])])
    n = opened.metadata.num_rows
    paths: list[Any] = [None] * n
    if has_path:
        paths = [(one or {}).get("path") for one in table.column(top).to_pylist()]
    paths = [os.fsdecode(path) if isinstance(path, bytes) else path for path in paths]
    paths = [path if isinstance(path, str) else None for path in paths]
    labels = table.column(label[0]).to_pylist() if label else [None] * n
    told = label[1] if label else []
    classes = [class_of(value) for value in labels]
    classes = [
        (number, class_of(told[number])[1] or told[number] if 0 <= number < len(told) else text)
        for number, text in classes
    ]
    return [(path or "", number, text) for path, (number, text) in zip(paths, classes, strict=True)]
