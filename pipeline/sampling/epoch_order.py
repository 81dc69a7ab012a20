"""The order in which an epoch shows images: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache.format.manifest import printable_paths
from pipeline.config import CropPolicy
from pipeline.sampling import philox
from pipeline.sampling.cutmix import GROUP

ROW_ORDER = 0xFFFFFFFF  # the counter of the row order's draws; no view has this number


def row_order(seed: int, paths: np.ndarray) -> np.ndarray:
    """Return a random order of the rows, int64 [n]. The draw of a row depends on the
    seed and on its path alone."""
    low, high = philox.split(
        philox.identities(np.array([printable_paths(p) for p in paths], object))
    )
    drawn = philox.words(seed, low, high, ROW_ORDER)
    return np.lexsort((drawn[:, 1], drawn[:, 0]))


# Blocks of a window, of about 1 MiB of codes each: they are held in memory and shuffled
# together. With several views of each image a window has fewer blocks.
WINDOW_BLOCKS = 64
FEWEST_BLOCKS = 4  # of a window


def blocks_of(chunk_rows: int, shard_rows: int, policy: CropPolicy) -> tuple[int, int]:
    """Return (rows of a block, blocks of a window).

    A block is read at once: it is a chunk or, with CutMix, holds whole groups of
    partners. The blocks of a window are shuffled together.
    """
    if policy.cutmix is None:
        return chunk_rows, WINDOW_BLOCKS
    rows = next(
        n
        for n in (chunk_rows, GROUP, shard_rows)
        if n >= min(GROUP, shard_rows) and shard_rows % n == 0
    )
    return rows, max(FEWEST_BLOCKS, WINDOW_BLOCKS * chunk_rows // rows)


def epoch_windows(
    usable: np.ndarray, block_rows: int, seed: int, epoch: int, window_blocks: int = WINDOW_BLOCKS
) -> Iterator[np.ndarray]:
    """Yield the rows of an epoch, int64, window by window, as a pure function of (seed,
    epoch).

    usable: int64 rows, rising. Blocks come in random order; ``window_blocks`` of them
    make a window, whose rows are shuffled together. Every usable row comes exactly
    once.
    """
    blocks = np.split(usable, np.flatnonzero(np.diff(usable // block_rows)) + 1)
    order = philox.permutation(seed, len(blocks), epoch, 1)
    for first in range(0, len(order), window_blocks):
        rows = np.concatenate([blocks[b] for b in order[first : first + window_blocks]])
        yield rows[philox.permutation(seed, len(rows), epoch, 2 + first)]


def side_by_side(rows: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Reorder rows so that the two rows of a CutMix pair are next to each other.

    rows: int [n], in random order. partner: int [n], the row whose crop is pasted into
    each row; -1: none. Returns int64 [n] places in ``rows``. A pair comes at the place
    of its row with the lower number. (At the earlier place of its two rows, pairs would
    tend to come before single rows.) Otherwise the order is kept.

    Every batch of an even number of rows then holds both rows of its pairs, and no
    image has to be decoded twice.
    """
    own = np.arange(len(rows))
    sorter = np.argsort(rows)
    found = sorter[np.searchsorted(rows, partner, sorter=sorter).clip(0, len(rows) - 1)]
    theirs = np.where((rows[found] == partner) & (found != own), found, -1)
    # The relation may be one-sided: a row is pasted into its partner, but has no
    # partner itself. A third row, whose partner already belongs to a pair, stays
    # single.
    linked = (theirs >= 0) & ((theirs[theirs] == own) | (theirs[theirs] < 0))
    mate = np.full(len(rows), -1)
    mate[theirs[linked]] = own[linked]
    mate[linked] = theirs[linked]
    paired = (mate >= 0) & (mate[mate] == own)
    key = np.where(paired, np.where(rows <= rows[mate], own, mate), len(rows))
    single = np.flatnonzero(~paired)
    whole = len(single) // 2 * 2
    # Single rows come two by two as well, so that every pair begins at an even place.
    key[single[:whole]] = np.repeat(single[:whole:2], 2)
    return np.lexsort((own, key))


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's global batches, in rows. The last batch holds the
    rows that are left. A single row joins the batch before, since BatchNorm needs
    two."""
    sizes = [batch_size] * (rows // batch_size)
    rest = rows % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


@dataclass(frozen=True)
class Layout:
    """The rows of a store that belong together. block_rows: are read at once.
    window_blocks: blocks that are shuffled together. shard_rows: of a file."""

    block_rows: int
    window_blocks: int
    shard_rows: int


def part_windows(
    rows: np.ndarray, layout: Layout, drawn: tuple[int, int], part: slice
) -> Iterator[np.ndarray]:
    """Yield a part of an epoch's order, window by window, as a pure function of its
    arguments.

    rows: int64 [n], rising. drawn: seed and epoch. part: of the places 0 … n in the
    order; places from n on are those from 0 on again. Returns int64 places in ``rows``.
    Shards come in random order, and so do the blocks of each; the rows of a window are
    shuffled together. So each of several parts touches shards of its own, and two more
    at most.
    """
    seed, epoch = drawn
    of_block = rows // layout.block_rows
    blocks = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(of_block)) + 1)
    shard = np.array([rows[block[0]] // layout.shard_rows for block in blocks])
    _, number = np.unique(shard, return_inverse=True)
    of_shard, own = (philox.permutation(seed, len(blocks), epoch, 1 + axis) for axis in range(2))
    # A block comes at its shard's random number, and then at one of its own.
    order = np.lexsort((own, of_shard[number]))
    whole = np.concatenate([blocks[block] for block in order])
    mine = whole[np.arange(part.start, part.stop) % len(whole)]
    begins = np.flatnonzero(np.diff(of_block[mine])) + 1  # of blocks, after the first
    place = part.start
    for window in np.split(mine, begins[layout.window_blocks - 1 :: layout.window_blocks]):
        yield window[philox.permutation(seed, len(window), epoch, 3 + place)]
        place += len(window)
