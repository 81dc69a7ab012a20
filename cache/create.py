"""Create an empty label store.

A store is made in a folder beside its final path, synced to the disk, and then renamed.
So a store exists whole or not at all.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from cache.format.manifest import Images
from cache.format.schema import (
    CROP_ARRAYS,
    FORMAT,
    RECORD,
    format_version,
    how_to_read,
    shard_arrays,
)
from cache.format.seal import read_metadata, write_seal
from cache.system.durable import make_folder, sync_folder, sync_tree
from cache.system.local import require_local
from cache.system.processes import alive

FORGOTTEN = 86_400.0  # age in seconds at which another machine's unfinished store is removed


def create(path: Path, *, images: Images, views: int, attributes: dict[str, Any]) -> bool:
    """Create an empty store at ``path``. Returns False if another process created a
    store there first.

    The store is made in a folder beside ``path``, synced, and then renamed. So a store
    exists whole or not at all. attributes: ``codec``, ``class_names``, ``provenance``,
    and any others that describe the store.
    """
    require_local(path)
    make_folder(path.parent)
    host = socket.gethostname()
    # remove unfinished stores of killed processes
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.creating"):
        *_, process, _ = left.name.split(".")
        # The age decides on another machine's stores, since its processes can't be
        # looked up. Creating a store takes an hour at most.
        if not left.name.startswith(f".{path.name}.{host}."):
            gone = time.time() - left.stat().st_mtime > FORGOTTEN
        else:  # in containers every run may have the same process number
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


def _fill(scratch: Path, images: Images, views: int, attributes: dict[str, Any]) -> None:
    """Write an empty store into the folder ``scratch``.

    Zarr writes into memory. If Zarr wrote the files itself, its threads would go on
    after an error in one of them, and write into a folder that is being removed.
    """
    content: dict[str, Any] = {}
    _make(MemoryStore(content), images, views, attributes)
    for name, value in content.items():
        file = scratch / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(value.as_buffer_like())
    write_seal(scratch, read_metadata(scratch, shard_arrays(attributes)[1:]))


def _make(store: MemoryStore, images: Images, views: int, attributes: dict[str, Any]) -> None:
    """Make the arrays of an empty store, and fill its manifest."""
    n, classes = len(images), len(attributes["class_names"])
    chunk_rows, shard_rows = (
        attributes["provenance"]["layout"][key] for key in ("chunk_rows", "shard_rows")
    )
    shards = -(-n // shard_rows)
    chain = [ZstdCodec(level=3), Crc32cCodec()]
    packing = [ZstdCodec(level=attributes["codec"].get("compression", 3)), Crc32cCodec()]
    always: Any = {"write_empty_chunks": True}
    kept = shard_arrays(attributes)[1:]
    mixed = "mix_box" in kept
    group = zarr.create_group(
        store,
        zarr_format=3,
        attributes={
            "format": FORMAT,
            "format_version": format_version(attributes["provenance"]),
            "views": views,
            "how_to_read": how_to_read(attributes["provenance"], mixed),
            "record_fields": [
                [name, RECORD[name].base.str, list(RECORD[name].shape)]
                for name in RECORD.names or ()
            ],
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
