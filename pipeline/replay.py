"""Which images an epoch shows in which order, and their stored crops and labels, rendered and in batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cache import LabelStore
from cache.codec import Codec
from cache.schema import Images, canonical_digest
from pipeline import crops, philox, render
from pipeline.background import ahead
from pipeline.config import Crops, Render
from pipeline.images import Reader, naming

WINDOW_BLOCKS = 64  # of about 1 MiB each: what is shuffled together, and held in memory as codes


class Source(Protocol):
    """Where crops and labels come from: a label store, or an image folder alone."""

    images: Images
    class_names: list[str]
    views: int  # epoch e replays view e mod views
    block_rows: int  # rows that are read together
    policy: Crops
    backend: str
    identity: str  # of images, classes and labels: what a run is bound to

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray:
        """Codes [n, classes], or class indices int64 [n] where the class folders are the labels."""
        ...


class StoredLabels:
    """Crops and soft labels of a store; or its crops with hard labels, for a baseline on the same pixels."""

    def __init__(self, store: LabelStore, views: int, *, hard: bool = False) -> None:
        self.store, self.views, self.hard = store, views, hard
        self.images, self.class_names, self.block_rows = store.images, store.class_names, store.chunk_rows
        self.policy = policy_of(store)
        self.backend: str = store.provenance["renderer"]["backend"]
        self.identity = store.identity.hex()

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.store.crops(view, rows)

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray:
        return self.images.class_index[rows].astype(np.int64) if self.hard else self.store.codes(view, rows)


class FolderLabels:
    """The class folders as hard labels, with fresh crops in every epoch: plain training, and how own teachers are made."""

    def __init__(self, images: Images, class_names: list[str], policy: Crops, backend: str, views: int) -> None:
        self.images, self.class_names, self.policy, self.backend, self.views = images, class_names, policy, backend, views
        self.block_rows = max(1, len(images))
        self.paths = philox.identities(images.path)
        self.identity = canonical_digest({"manifest": images.manifest_digest(), "classes": class_names}).hex()

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return crops.draw(self.policy, self.paths[rows], self.images.height[rows], self.images.width[rows], view)

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray:
        return self.images.class_index[rows].astype(np.int64)


def policy_of(store: LabelStore) -> Crops:
    """The crop policy that a store was made with, and its number of views."""
    kept = {key: value for key, value in store.provenance["crops"].items() if key in Crops.model_fields}
    return Crops(**kept, views=store.views)


@dataclass
class Batch:
    rows: np.ndarray  # int64 [n], rows of the source
    pixels: torch.Tensor  # uint8 [n, size, size, 3]
    labels: torch.Tensor  # codes [n, classes], or int64 [n]
    total: int  # rows of the global batch, of which these are this process's part


def epoch_windows(usable: np.ndarray, block_rows: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The order of an epoch, a pure function of (seed, epoch): rows of some blocks, shuffled together; then of the next ones.

    usable: int64 rows, rising. Blocks come in a random order too. Every usable row comes exactly once.
    """
    blocks = np.split(usable, np.flatnonzero(np.diff(usable // block_rows)) + 1)
    order = philox.permutation(seed, len(blocks), epoch, 1)
    for first in range(0, len(order), WINDOW_BLOCKS):
        rows = np.concatenate([blocks[b] for b in order[first : first + WINDOW_BLOCKS]])
        yield rows[philox.permutation(seed, len(rows), epoch, 2 + first)]


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's global batches. The last one is what is left; a single row joins the batch before, since BatchNorm needs two."""
    sizes = [batch_size] * (rows // batch_size)
    rest = rows % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


class Replay:
    """Epochs of a source as batches: the same sequence of global batches for every number of processes."""

    def __init__(
        self, source: Source, folder: Path, *, image_size: int, batch_size: int, seed: int, rendering: Render, rank: int = 0, world: int = 1
    ) -> None:
        self.source, self.image_size, self.seed, self.rank, self.world = source, image_size, seed, rank, world
        self.sizes = batch_sizes(len(source.images.usable), batch_size)
        self.read = Reader(folder, source.images, rendering.threads)
        self.renderer = render.Crops(
            [image_size],
            1,
            -(-max(self.sizes) // world),
            interpolation=source.policy.interpolation,
            exif=source.policy.exif,
            backend=source.backend,
            threads=rendering.threads,
        )

    def epoch(self, epoch: int) -> AbstractContextManager[Iterator[Batch]]:
        """Batches of one epoch, rendered ahead in a thread: ``with replay.epoch(3) as batches: for batch in batches: …``."""
        return ahead(self._batches(epoch))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        view = epoch % self.source.views
        sizes = iter(self.sizes)
        size = next(sizes, 0)
        waiting: list[np.ndarray] | None = None
        for window in epoch_windows(self.source.images.usable, self.source.block_rows, self.seed, epoch):
            fresh = [window, self.source.labels(view, window), *self.source.crops(view, window)]
            waiting = fresh if waiting is None else [np.concatenate(pair) for pair in zip(waiting, fresh, strict=True)]
            while size and len(waiting[0]) >= size:
                yield self._batch(*(column[:size] for column in waiting))
                waiting = [column[size:] for column in waiting]
                size = next(sizes, 0)

    def _batch(self, rows: np.ndarray, labels: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> Batch:
        mine = np.array_split(np.arange(len(rows)), self.world)[self.rank]
        with naming(self.source.images, rows[mine]):
            pixels = self.renderer(self.read(rows[mine]), boxes[None, mine], flips[None, mine])[0][self.image_size]
        return Batch(rows[mine], pixels, torch.from_numpy(np.ascontiguousarray(labels[mine])), len(rows))


class Decoder:
    """Codes → probabilities on the training device: what travels there is a byte a class."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.zero = codec.zero
        self.table = None if codec.table is None else torch.from_numpy(codec.table).to(device)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [n, classes] → float32 [n, classes], as ``Codec.decode``: above zero, rows summing to one."""
        p = codes.float().clamp_min(self.zero) if self.table is None else self.table[codes.int()]
        return p / p.sum(dim=1, keepdim=True)
