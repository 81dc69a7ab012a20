"""Which images an epoch shows in which order, and their stored crops and labels, rendered and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config import CutMix, Render
from pipeline.images.reader import Reader, naming
from pipeline.render import mixing
from pipeline.render.dali import CropRenderer, Rendered
from pipeline.runtime.device_transfer import Sender, Sent
from pipeline.runtime.profiling import Clock
from pipeline.runtime.threads import ahead
from pipeline.sampling import cutmix, philox
from pipeline.sampling.epoch_order import FEWEST_BLOCKS, batch_sizes, epoch_windows, side_by_side
from pipeline.training.source import Source


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
        self.renderer = CropRenderer(
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
                    {size: mixing.paste(p[: len(rows)], p, at[:, j], mix_box[:, j]) for size, p in view.items()}
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

    def _render(self, rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> Rendered:
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
