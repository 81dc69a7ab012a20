"""Which images an epoch shows in which order, and their stored crops and labels, rendered and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cache import LabelStore
from cache.codec import Codec
from cache.schema import Images, canonical_digest
from pipeline import cutmix, philox, render
from pipeline.background import ahead
from pipeline.config import Crops, CutMix, Render
from pipeline.images import Reader, naming
from pipeline.plan import Plan
from pipeline.timing import Clock
from pipeline.transfer import Sender, Sent

WINDOW_BLOCKS = 64  # of about 1 MiB each: what is shuffled together, and held in memory as codes, the fewer the more views of it are
FEWEST_BLOCKS = 4


class Source(Protocol):
    """Where crops and labels come from: a label store, or an image folder alone."""

    images: Images
    class_names: list[str]
    views: int  # epoch e replays view e mod views
    block_rows: int  # rows that are read together
    window_blocks: int  # blocks that are shuffled together
    policy: Crops
    backend: str
    identity: str  # of images, classes and labels: what a run is bound to
    codec: Codec | None  # of ``labels``
    how: dict  # what live teachers' labels depend on, beside images and classes
    teachers: list[str]  # timm names with tags of who made the labels; empty if nobody did
    imported: dict | None  # what is known of labels that others made

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def mixes(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of partners int32 [n], -1 for none, and rectangles float32 [n, 4]; asked for only if ``policy.cutmix`` is set."""
        ...

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray | None:
        """Codes [n, classes]; None where nothing is stored: the class folders are the labels, or teachers are asked in training."""
        ...


class StoredLabels:
    """Crops and soft labels of a store; or its crops with hard labels, for a baseline on the same pixels."""

    def __init__(self, store: LabelStore, views: int, *, hard: bool = False) -> None:
        self.store, self.views, self.hard = store, views, hard
        self.images, self.class_names = store.images, store.class_names
        self.policy = policy_of(store)
        self.block_rows, self.window_blocks = blocks_of(store.chunk_rows, store.shard_rows, self.policy)
        self.backend: str = store.provenance["renderer"]["backend"]
        self.identity = store.identity.hex()
        self.codec, self.how = (None if hard else store.codec), {}
        self.teachers = [] if hard else [teacher["model"] for teacher in store.provenance["teachers"]]
        self.imported = None if hard else store.provenance.get("imported")

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.store.crops(view, rows)

    def mixes(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.store.mixes(view, rows)

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray | None:
        return None if self.hard else self.store.codes(view, rows)


class DrawnCrops:
    """Crops drawn as training goes, exactly those that a store of the same policy and layout would hold: for training from class folders,
    which is also how own teachers are made, and for online training, which asks live teachers.

    layout: rows of a chunk and of a shard. how: what labels depend on beside images and classes."""

    def __init__(
        self, images: Images, class_names: list[str], policy: Crops, backend: str, views: int, layout: tuple[int, int], how: dict
    ) -> None:
        self.images, self.class_names, self.policy, self.backend, self.views = images, class_names, policy, backend, views
        self.block_rows, self.window_blocks = blocks_of(*layout, policy)
        self.plan = Plan(policy, images, layout[1])
        self.crops, self.mixes = self.plan.crops, self.plan.mixes
        self.identity = canonical_digest({"manifest": images.manifest_digest(), "classes": class_names}).hex()
        self.codec, self.how = None, how
        self.teachers, self.imported = [teacher["model"] for teacher in how.get("teachers", ())], None

    def labels(self, view: int, rows: np.ndarray) -> None:
        return None


def blocks_of(chunk_rows: int, shard_rows: int, policy: Crops) -> tuple[int, int]:
    """(rows of a block, blocks of a window) for reading and shuffling: a chunk is a block; with CutMix a block holds whole groups of partners."""
    if policy.cutmix is None:
        return chunk_rows, WINDOW_BLOCKS
    rows = next(n for n in (chunk_rows, cutmix.GROUP, shard_rows) if n >= min(cutmix.GROUP, shard_rows) and shard_rows % n == 0)
    return rows, max(FEWEST_BLOCKS, WINDOW_BLOCKS * chunk_rows // rows)


def policy_of(store: LabelStore) -> Crops:
    """The crop policy that a store was made with, as far as it is known, and its number of views."""
    kept = {key: value for key, value in store.provenance["crops"].items() if key in Crops.model_fields and value is not None}
    return Crops(**kept, views=store.views)


@dataclass
class Mixed:
    """What was pasted into the pictures of a batch."""

    area: torch.Tensor  # float32 [n], the share of each picture that is pasted
    class_index: torch.Tensor  # int64 [n], of the partners
    labels: torch.Tensor | None  # codes [n, classes] of the partners, to be mixed by area; None where a label is of the mixed picture


@dataclass
class Batch:
    """Crops of some images: crop j of image i is at j · len(rows) + i."""

    rows: np.ndarray  # int64 [images], rows of the source
    pixels: dict[int, torch.Tensor]  # output size → uint8 [n, size, size, 3]
    labels: torch.Tensor | None  # codes [n, classes], or None
    class_index: torch.Tensor  # int64 [n]
    mixed: Mixed | None
    total: int  # crops of the global batch, of which these are this process's part
    world: int = 1  # processes that have a part
    copies: int = 1  # how many processes have each crop: all of them, of a batch that is too small to be divided

    def __len__(self) -> int:
        return len(self.class_index)

    @property
    def weight(self) -> float:
        """What the mean over this part counts in a mean over the processes that is to be the one over the global batch."""
        return len(self) * self.world / (self.total * self.copies)


def epoch_windows(usable: np.ndarray, block_rows: int, seed: int, epoch: int, window_blocks: int = WINDOW_BLOCKS) -> Iterator[np.ndarray]:
    """The order of an epoch, a pure function of (seed, epoch): rows of some blocks, shuffled together; then of the next ones.

    usable: int64 rows, rising. Blocks come in a random order too. Every usable row comes exactly once.
    """
    blocks = np.split(usable, np.flatnonzero(np.diff(usable // block_rows)) + 1)
    order = philox.permutation(seed, len(blocks), epoch, 1)
    for first in range(0, len(order), window_blocks):
        rows = np.concatenate([blocks[b] for b in order[first : first + window_blocks]])
        yield rows[philox.permutation(seed, len(rows), epoch, 2 + first)]


def side_by_side(rows: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Rows in a random order, and whose crop is pasted into each (CutMix; -1: none) → int64 [n] places that put the two of a pair next to each
    other, at the place of the one with the lower row number (the earlier place of two would bring pairs before singles), and keep the order else.

    So a batch of an even number of rows holds both, and neither has to be decoded twice.
    """
    own = np.arange(len(rows))
    sorter = np.argsort(rows)
    found = sorter[np.searchsorted(rows, partner, sorter=sorter).clip(0, len(rows) - 1)]
    theirs = np.where((rows[found] == partner) & (found != own), found, -1)
    # One may be pasted into the other without the other way round; a third that takes one of a pair stays single.
    linked = (theirs >= 0) & ((theirs[theirs] == own) | (theirs[theirs] < 0))
    mate = np.full(len(rows), -1)
    mate[theirs[linked]] = own[linked]
    mate[linked] = theirs[linked]
    paired = (mate >= 0) & (mate[mate] == own)
    key = np.where(paired, np.where(rows <= rows[mate], own, mate), len(rows))
    single = np.flatnonzero(~paired)
    whole = len(single) // 2 * 2
    key[single[:whole]] = np.repeat(single[:whole:2], 2)  # singles two by two too, at the first one's place
    return np.lexsort((own, key))


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
    """Epochs of a source as batches: the same sequence of global batches for every number of processes.

    sizes: output sizes in pixels, the first one the student's. batch_size: crops of a global batch. crops_per_image: how many views of each image
    are in a batch (FKD, arXiv 2112.01528): an epoch's pass over the images then shows that many views. mix: CutMix by area, of neighbours in the batch.
    rank, world: which of how many processes this is, each of which has a part of every batch. device: where the tensors are to be.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        *,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        rendering: Render,
        crops_per_image: int = 1,
        mix: CutMix | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.source, self.size, self.seed, self.mix, self.rank, self.world = source, sizes[0], seed, mix, rank, world
        self.send, self.clock = Sender(device or torch.device("cpu")), clock or Clock()
        self.views = crops_per_image
        self.begun: tuple[int, ExitStack, Iterator[Sent[Batch]]] | None = None
        self.window_blocks = max(FEWEST_BLOCKS, source.window_blocks // crops_per_image)
        self.sizes = batch_sizes(len(source.images.usable), batch_size // crops_per_image)  # in images
        self.class_index = source.images.class_index.astype(np.int64)
        self.read = Reader(folder, source.images, rendering.threads)
        self.renderer = render.Crops(
            sizes,
            self.views,
            max(len(self._mine(size)) for size in self.sizes)
            * (1 + (self.views if mix or source.policy.cutmix else 0)),  # with partners, at worst
            interpolation=source.policy.interpolation,
            exif=source.policy.exif,
            backend=source.backend,
            threads=rendering.threads,
            pinned=self.send.device.type == "cuda" and not (mix or source.policy.cutmix),  # mixed pictures are new tensors
        )

    def close(self) -> None:
        """End all threads."""
        self.forget()
        self.read.__exit__()

    def _mine(self, size: int) -> np.ndarray:
        """Places in a global batch of so many images that are this process's part: all, where there aren't two for each, since BatchNorm needs two and
        nobody may be without a gradient."""
        return np.arange(size) if self._is_small(size) else np.array_split(np.arange(size), self.world)[self.rank]

    def _is_small(self, size: int) -> bool:
        return size < 2 * self.world

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        """Batches of one pass over the images, rendered ahead in a thread, with tensors on the device: ``with replay.epoch(3) as batches: for batch in
        batches: …``.

        It replays the views epoch, epoch + 1, …, one for each of ``crops_per_image``, modulo the source's views.
        """
        if self.begun is None or self.begun[0] != epoch:
            self.begin(epoch)
        (_, context, batches), self.begun = self.begun, None
        with context:
            yield (sent.received() for sent in batches)

    def begin(self, epoch: int) -> None:
        """Start to render an epoch that is going to be asked for, while other things are done."""
        self.forget()
        context = ExitStack()
        self.begun = epoch, context, context.enter_context(ahead(self._batches(epoch)))

    def forget(self) -> None:
        """Drop what was begun."""
        if self.begun is not None:
            (_, context, _), self.begun = self.begun, None
            context.close()

    def _batches(self, epoch: int) -> Iterator[Sent[Batch]]:
        sizes = iter(self.sizes)
        size = next(sizes, 0)
        waiting: list[np.ndarray | None] | None = None
        with ahead(self._windows(epoch), depth=1) as windows, self.send.beside():
            for fresh in windows:
                waiting = fresh if waiting is None else [_join(pair) for pair in zip(waiting, fresh, strict=True)]
                while size and len(waiting[0]) >= size:
                    batch = self._batch(epoch, *(None if column is None else column[:size] for column in waiting))
                    with self.clock.part("send"):
                        sent = self.send(batch)
                    yield sent
                    waiting = [None if column is None else column[size:] for column in waiting]
                    size = next(sizes, 0)

    def _windows(self, epoch: int) -> Iterator[list[np.ndarray | None]]:
        for rows in epoch_windows(self.source.images.usable, self.source.block_rows, self.seed, epoch, self.window_blocks):
            with self.clock.part("labels"):
                columns = self._columns(epoch, rows)
            yield columns

    def _columns(self, epoch: int, rows: np.ndarray) -> list[np.ndarray | None]:
        """All that the source knows of some rows, in the epoch's order, per view in the second axis: rows [n], labels [n, views, classes] or None,
        boxes [n, views, 4], flips [n, views]; with the source's CutMix also partner [n, views], box and flip of the partner's crop, and
        mix_box [n, views, 4]."""
        source = self.source
        views = [(epoch + j) % source.views for j in range(self.views)]
        mixes = [source.mixes(view, rows) for view in views] if source.policy.cutmix else []
        if mixes and self.views == 1:
            order = side_by_side(rows, mixes[0][0])
            rows, mixes = rows[order], [tuple(column[order] for column in mixes[0])]
        columns: list[list] = []
        for j, view in enumerate(views):
            column = [source.labels(view, rows), *source.crops(view, rows)]
            if mixes:
                partner, mix_box = mixes[j]
                partner = np.where(partner < 0, rows, partner)
                column += [partner, *source.crops(view, partner), mix_box]
            columns.append(column)
        return [rows, *(None if per_view[0] is None else _stacked(per_view) for per_view in zip(*columns, strict=True))]

    def _batch(
        self, epoch: int, rows: np.ndarray, labels: np.ndarray | None, boxes: np.ndarray, flips: np.ndarray, *mixes: np.ndarray
    ) -> Batch:
        """This process's part of a global batch."""
        mine, total, copies = self._mine(len(rows)), len(rows) * self.views, self.world if self._is_small(len(rows)) else 1
        by_area = None
        if self.mix:  # neighbours in the batch, which is in a random order
            mate = cutmix.pairs(np.arange(len(rows)))
            identity = philox.identities(self.source.images.path[rows])
            drawn = [cutmix.boxes(self.mix, self.seed, identity, epoch + j) for j in range(self.views)]
            mixes = (np.repeat(rows[mate][:, None], self.views, axis=1), boxes[mate], flips[mate], np.stack(drawn, axis=1))
            by_area = None if labels is None else _flat(labels[mate][mine])
        labels = None if labels is None else torch.from_numpy(_flat(labels[mine]))
        mixes = tuple(column[mine] for column in mixes)
        rows, boxes, flips = rows[mine], boxes[mine], flips[mine]
        mixed = None
        if not mixes:
            pixels = {size: p.flatten(0, 1) for size, p in self._render(rows, boxes, flips).all_views.items()}
        else:
            partner, their_boxes, their_flips, mix_box = mixes
            partner = np.where(mix_box.any(axis=2), partner, rows[:, None])
            shown, boxes, flips, at = with_partners(rows, boxes, flips, partner, their_boxes, their_flips)
            views = self._render(shown, boxes, flips)
            with self.clock.part("mix"):
                views = [
                    {size: cutmix.paste(p[: len(rows)], p, at[:, j], mix_box[:, j]) for size, p in view.items()}
                    for j, view in enumerate(views)
                ]
            pixels = {size: torch.cat([view[size] for view in views]) if len(views) > 1 else views[0][size] for size in views[0]}
            mixed = Mixed(
                torch.from_numpy(cutmix.area(_flat(mix_box), self.size)),
                torch.from_numpy(self.class_index[_flat(partner)]),
                None if by_area is None else torch.from_numpy(by_area),
            )
        classes = torch.from_numpy(np.tile(self.class_index[rows], self.views))
        return Batch(rows, pixels, labels, classes, mixed, total, self.world, copies)

    def _render(self, rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> render.Rendered:
        """Boxes [n, views, 4] and flips [n, views] of some rows → per view: output size → uint8 [n, size, size, 3]."""
        with self.clock.part("read"):
            blobs = self.read(rows)
        with self.clock.part("render"), naming(self.source.images, rows):
            return self.renderer(blobs, boxes.swapaxes(0, 1), flips.swapaxes(0, 1))


def with_partners(
    rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray, partner: np.ndarray, their_boxes: np.ndarray, their_flips: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What to render for a batch with CutMix: its rows, and behind them those partners that aren't among them, each once.

    rows [n]; boxes [n, views, 4] and flips [n, views] of their crops; partner [n, views] rows, with box and flip of the partner's crop.
    Returns rows, boxes and flips of all that is needed, and int64 [n, views]: at which of these places each partner is.
    """
    views = partner.shape[1]
    absent, first = np.unique(partner, return_index=True)
    new = ~np.isin(absent, rows)
    absent, first = absent[new], np.divmod(first[new], views)
    shown = np.concatenate([rows, absent])
    sorter = np.argsort(shown)
    at = sorter[np.searchsorted(shown, partner, sorter=sorter)]
    # In a view that doesn't need an image any of its crops will do.
    more_boxes, more_flips = (np.repeat(column[first][:, None], views, axis=1) for column in (their_boxes, their_flips))
    for j in range(views):
        outside = np.flatnonzero(at[:, j] >= len(rows))
        more_boxes[at[outside, j] - len(rows), j] = their_boxes[outside, j]
        more_flips[at[outside, j] - len(rows), j] = their_flips[outside, j]
    return shown, np.concatenate([boxes, more_boxes]), np.concatenate([flips, more_flips]), at


def _join(pair: tuple[np.ndarray | None, np.ndarray | None]) -> np.ndarray | None:
    return None if pair[0] is None else np.concatenate(pair)


def _stacked(per_view: Sequence[np.ndarray]) -> np.ndarray:
    """[n, …] a view → [n, views, …]; of one view no copy is made."""
    return per_view[0][:, None] if len(per_view) == 1 else np.stack(per_view, axis=1)


def _flat(column: np.ndarray) -> np.ndarray:
    """[images, views, …] → [views · images, …], the order of a batch."""
    return np.ascontiguousarray(column.swapaxes(0, 1).reshape(-1, *column.shape[2:]))
