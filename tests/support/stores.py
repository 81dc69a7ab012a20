"""Write stores by hand: 70 rows, with labels and crops that a test can compute."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from cache import LabelStore
from cache import create as create_module
from cache.format import manifest as manifest_module
from cache.format.codec import CODECS
from cache.format.crops import Crops
from cache.format.manifest import Images
from cache.writer import StoreWriter
from support.small import toy_provenance

N, CLASSES, SHARD, CHUNK = 70, 5, 16, 4
SHARDS = 5  # the last has 6 rows
UNUSABLE = (3, 17, 40, *range(48, 64))  # the range is all of shard 3
USABLE = np.setdiff1d(np.arange(N), UNUSABLE)


def manifest() -> Images:
    status = np.zeros(N, "uint8")
    status[list(UNUSABLE)] = manifest_module.UNUSABLE
    rng = np.random.default_rng(0)
    return Images(
        path=np.array([f"c{i % CLASSES}/é{i:03d}.jpg" for i in range(N)], dtype=object),
        bytes=rng.integers(1, 1 << 40, N),
        digest=rng.integers(0, 256, (N, 32)).astype("uint8"),
        height=np.where(status, 0, 48).astype("int32"),
        width=np.where(status, 0, 64).astype("int32"),
        class_index=(np.arange(N) % CLASSES).astype("int32"),
        status=status,
        reason=np.array(["cut short" if bad else "" for bad in status], dtype=object),
    )


def create(path: Path, codec: str = "pow8", views: int = 2) -> bool:
    layout = {"chunk_rows": CHUNK, "shard_rows": SHARD}
    attributes = {
        "codec": CODECS[codec].describe(),
        "provenance": toy_provenance(CODECS[codec], manifest(), layout),
        "class_names": [f"c{i}" for i in range(CLASSES)],
    }
    return create_module.create(path, images=manifest(), views=views, attributes=attributes)


def truth(view: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make up the probabilities, boxes and flips of a whole view."""
    rng = np.random.default_rng(view)
    return (
        rng.dirichlet([0.3] * CLASSES, N).astype("float32"),
        rng.integers((0, 0, 1, 1), (8, 24, 41, 41), (N, 4)).astype("int32"),
        rng.random(N) < 0.5,
    )


def blocks(writer: StoreWriter, view: int, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = writer.store.shard_slice(shard)
    p, boxes, flips = (whole[rows] for whole in truth(view))
    bad = np.isin(np.arange(N), UNUSABLE)[rows]
    codes, boxes, flips = writer.store.codec.encode(p), boxes.copy(), flips.copy()
    codes[bad], boxes[bad], flips[bad] = 0, 0, False
    return codes, boxes, flips


def fill(path: Path, *places: tuple[int, int]) -> LabelStore:
    """Write the shards (view, shard), or all shards if none is given, and open the
    store anew."""
    writer = StoreWriter(path)
    for view, shard in places or np.ndindex(writer.store.views, writer.store.shards):
        write(writer, view, shard, *blocks(writer, view, shard))
    return LabelStore.open(path)


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write(
    writer: StoreWriter, view: int, shard: int, codes: np.ndarray, *crops: np.ndarray
) -> None:
    """Write a shard: codes, and the arrays of ``schema.crop_arrays`` in their order."""
    writer.write(view, shard, codes, Crops(*crops))
