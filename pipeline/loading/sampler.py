"""The order in which a data loader reads a store, divided among the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from pipeline.sampling.epoch_order import Layout, part_windows


class Ordered(Protocol):
    """A dataset whose items are rows of a store. rows: int64 [items], rising."""

    rows: np.ndarray
    layout: Layout

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


class StoredCropsSampler(DistributedSampler):
    """A random order that reads few chunks of the store at a time.

    It divides the items as torch's DistributedSampler does: every rank gets equally
    many, some items twice if they don't divide, or with ``drop_last`` none twice and a
    few not at all. Each rank reads shards of its own. The order is a function of seed
    and epoch (``part_windows``).

    part: (rank, world), None: as torch.distributed says, or 0 of 1. seed: of the order.
    """

    def __init__(
        self,
        dataset: Ordered,
        *,
        seed: int,
        shuffle: bool,
        part: tuple[int | None, int | None],
        drop_last: bool,
    ) -> None:
        rank, world = part
        together = dist.is_available() and dist.is_initialized()
        if world is None:
            world = dist.get_world_size() if together else 1
        if rank is None:
            rank = dist.get_rank() if together else 0
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to world - 1, {world - 1}, got {rank}")
        self.crops = dataset
        whole: Any = dataset
        super().__init__(whole, world, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)

    def __iter__(self) -> Iterator[int]:
        whole, rank = self.num_samples * self.num_replicas, self.rank
        mine = slice(rank * self.num_samples, (rank + 1) * self.num_samples)
        if not self.shuffle:
            yield from (np.arange(whole)[mine] % len(self.crops)).tolist()
            return
        drawn = self.seed, self.epoch
        for window in part_windows(self.crops.rows, self.crops.layout, drawn, mine):
            yield from window.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the order, and the dataset's view."""
        super().set_epoch(epoch)
        self.crops.set_epoch(epoch)
