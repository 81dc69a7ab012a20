"""The order in which an epoch shows images: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cache.format.manifest import printable_paths
from pipeline.config import CropPolicy
from pipeline.sampling import philox
from pipeline.sampling.cutmix import GROUP

ROW_ORDER = 0xFFFFFFFF  # the counter of the row order's draws; no view has this number


def row_order(seed: int, paths: np.ndarray) -> np.ndarray:
    """int64 [n]: a random order of the rows that depends on the seed and on each path
    alone."""
    low, high = philox.split(
        philox.identities(np.array([printable_paths(p) for p in paths], object))
    )
    drawn = philox.words(seed, low, high, ROW_ORDER)
    return np.lexsort((drawn[:, 1], drawn[:, 0]))


# of about 1 MiB each: what is shuffled together, and held in memory as codes, the fewer
# the more views of it are
WINDOW_BLOCKS = 64
FEWEST_BLOCKS = 4


def blocks_of(chunk_rows: int, shard_rows: int, policy: CropPolicy) -> tuple[int, int]:
    """(rows of a block, blocks of a window) for reading and shuffling: a chunk is a
    block; with CutMix a block holds whole groups of partners."""
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
    """The order of an epoch, a pure function of (seed, epoch): rows of some blocks,
    shuffled together; then of the next ones.

    usable: int64 rows, rising. Blocks come in a random order too. Every usable row
    comes exactly once.
    """
    blocks = np.split(usable, np.flatnonzero(np.diff(usable // block_rows)) + 1)
    order = philox.permutation(seed, len(blocks), epoch, 1)
    for first in range(0, len(order), window_blocks):
        rows = np.concatenate([blocks[b] for b in order[first : first + window_blocks]])
        yield rows[philox.permutation(seed, len(rows), epoch, 2 + first)]


def side_by_side(rows: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Rows in a random order, and whose crop is pasted into each (CutMix; -1: none) →
    int64 [n] places that put the two of a pair next to each other, at the place of the
    one with the lower row number (the earlier place of two would bring pairs before
    singles), and keep the order else.

    So a batch of an even number of rows holds both, and neither has to be decoded
    twice.
    """
    own = np.arange(len(rows))
    sorter = np.argsort(rows)
    found = sorter[np.searchsorted(rows, partner, sorter=sorter).clip(0, len(rows) - 1)]
    theirs = np.where((rows[found] == partner) & (found != own), found, -1)
    # One may be pasted into the other without the other way round; a third that takes
    # one of a pair stays single.
    linked = (theirs >= 0) & ((theirs[theirs] == own) | (theirs[theirs] < 0))
    mate = np.full(len(rows), -1)
    mate[theirs[linked]] = own[linked]
    mate[linked] = theirs[linked]
    paired = (mate >= 0) & (mate[mate] == own)
    key = np.where(paired, np.where(rows <= rows[mate], own, mate), len(rows))
    single = np.flatnonzero(~paired)
    whole = len(single) // 2 * 2
    key[single[:whole]] = np.repeat(
        single[:whole:2], 2
    )  # singles two by two too, at the first one's place
    return np.lexsort((own, key))


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's global batches. The last one is what is left; a single row
    joins the batch before, since BatchNorm needs two."""
    sizes = [batch_size] * (rows // batch_size)
    rest = rows % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes
