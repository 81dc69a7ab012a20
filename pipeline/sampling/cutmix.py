"""Draw the random choices of CutMix: for each crop the partner whose crop is pasted
over it, and the rectangle that is pasted (Yun et al., arXiv 1905.04899, Sec. 3.1).

CutMix comes in two ways:

- Faithful (``crops.cutmix``), as in online training: the teachers label the mixed crop,
  the store keeps partner and rectangle of every crop, and the student sees the same mix
  bit for bit. Partners are drawn anew in every view, in pairs among GROUP neighbouring
  rows (rows are in random order). Each crop of a pair is pasted into the other, so that
  both stages find the partner's crop in memory and decode no image twice.
- By area (``train.cutmix``), with an ordinary store: neighbours in a batch of the
  student are each other's partners, and the label is the mean of both labels, weighted
  by the visible areas. The teachers never saw these mixed crops.

A rectangle is drawn for each crop: λ from Beta(β, β), sides √(1 − λ) of the output's
sides, centre uniform, cut off at the edges. Rectangles are kept as fractions of the
output, so that teachers and students of every size paste the same part: pixels from
⌊low · size + ½⌋ up to, but without, ⌊high · size + ½⌋.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv

from pipeline.config import CutMix
from pipeline.sampling import philox

GROUP = 1024  # rows among which partners are drawn
BOX, PARTNER = 11, 12  # philox counters of these draws, after those of random_crop


def boxes(policy: CutMix, seed: int, identity: np.ndarray, view: int) -> np.ndarray:
    """Draw the rectangles that are pasted over crops.

    identity: uint64 [n], of the images. Returns float32 [n, 4] top, left, bottom,
    right, as fractions of the output; all zeros for a crop that stays unmixed.
    """
    word = philox.words(seed, *philox.split(identity), view, BOX)
    u = philox.uniform(word[:, 0])
    share = u if policy.beta == 1 else betaincinv(policy.beta, policy.beta, u)  # λ, by inversion
    half = np.sqrt(1 - share) / 2
    top, left = philox.uniform(word[:, 2]), philox.uniform(word[:, 3])
    box = np.stack([top - half, left - half, top + half, left + half], axis=1).clip(0, 1)
    box[philox.uniform(word[:, 1]) >= policy.prob] = 0
    return box.astype(np.float32)


def partners(seed: int, identity: np.ndarray, usable: np.ndarray, view: int) -> np.ndarray:
    """Draw the partners of the rows of one shard.

    identity: uint64 [n]. usable: bool [n]. Returns int64 [n], each partner's place in
    the shard. In every group of GROUP rows the usable rows are put in random order, and
    neighbours become each other's partners. A last row without a neighbour gets the
    first row as its partner. An unusable row, or a row that is alone in its group, is
    its own partner.
    """
    partner = np.arange(len(usable))
    key = philox.words(seed, *philox.split(identity), view, PARTNER)[:, 0]
    for start in range(0, len(usable), GROUP):
        here = start + np.flatnonzero(usable[start : start + GROUP])
        here = here[np.argsort(key[here], kind="stable")]
        partner[here] = pairs(here)
    return partner


def pairs(order: np.ndarray) -> np.ndarray:
    """Pair neighbours in a random order, int [n], and return each element's partner,
    int [n]. A last element without a neighbour gets the first element."""
    place = np.arange(len(order)) ^ 1
    return order[np.where(place < len(order), place, 0)]


def pixel_box(box: np.ndarray, size: int) -> np.ndarray:
    """Round float32 [n, 4] fractions to int64 [n, 4] pixels of an output of size ×
    size, by the one rounding rule: ⌊fraction · size + ½⌋ in float64."""
    return np.floor(box.astype(np.float64) * size + 0.5).astype(np.int64)


def area(box: np.ndarray, size: int) -> np.ndarray:
    """Return the share of the output's pixels that each rectangle covers: float32 [n,
    4] fractions → float32 [n], 0 … 1."""
    top, left, bottom, right = pixel_box(box, size).T
    return ((bottom - top) * (right - left) / size**2).astype(np.float32)
