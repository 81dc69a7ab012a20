"""CutMix: which rectangle of whose crop is pasted over a crop, and the pasting (Yun et
al., arXiv 1905.04899, Sec. 3.1).

Faithfully, as online training has it (``crops.cutmix``): the teachers label the mixed
picture, the store keeps partner and rectangle of every crop, and the student sees the
same mix bit for bit. Partners are drawn anew in every view, in pairs among GROUP
neighbouring rows (rows are in a random order): each is pasted into the other, so that
both stages find the partner's crop in memory and decode nothing twice.

By area (``train.cutmix``), with an ordinary store: neighbours in a batch of the student
are each other's partners, and the label is the mean of both labels, weighted by the
areas that are seen. The teachers never saw such pictures.

Rectangles are drawn per crop: λ from Beta(β, β), sides √(1 − λ) of the output's, centre
uniform, cut off at the edges. They are kept as fractions of the output, so that every
size of teacher and student pastes the same part: pixels from ⌊low · size + ½⌋ up to,
without, ⌊high · size + ½⌋.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv

from pipeline.config import CutMix
from pipeline.sampling import philox

GROUP = 1024  # rows among which partners are drawn
BOX, PARTNER = 11, 12  # what a crop's draws are for: the counters after those of random_crop


def boxes(policy: CutMix, seed: int, identity: np.ndarray, view: int) -> np.ndarray:
    """Rectangles to paste into: uint64 [n] identities of the images → float32 [n, 4]
    top, left, bottom, right, as fractions of the output.

    All zeros where a crop stays unmixed.
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
    """Who is pasted into whom, in the rows of one shard: identities uint64 [n], usable
    bool [n] → int64 [n] places in the shard.

    In every group of GROUP rows the usable ones are put in a random order, in which
    neighbours are each other's partners; a last one left over gets the first. An
    unusable row, or one that is alone in its group, is its own partner.
    """
    partner = np.arange(len(usable))
    key = philox.words(seed, *philox.split(identity), view, PARTNER)[:, 0]
    for start in range(0, len(usable), GROUP):
        here = start + np.flatnonzero(usable[start : start + GROUP])
        here = here[np.argsort(key[here], kind="stable")]
        partner[here] = pairs(here)
    return partner


def pairs(order: np.ndarray) -> np.ndarray:
    """Partners of n things in a random order: neighbours two by two; a last one left
    over gets the first."""
    place = np.arange(len(order)) ^ 1
    return order[np.where(place < len(order), place, 0)]


def pixel_box(box: np.ndarray, size: int) -> np.ndarray:
    """float32 [n, 4] fractions → int64 [n, 4] pixels of an output of size × size: the
    one rounding rule, ⌊fraction · size + ½⌋ in float64."""
    return np.floor(box.astype(np.float64) * size + 0.5).astype(np.int64)


def area(box: np.ndarray, size: int) -> np.ndarray:
    """float32 [n, 4] fractions → float32 [n]: the share of the output's pixels that is
    pasted, 0 … 1."""
    top, left, bottom, right = pixel_box(box, size).T
    return ((bottom - top) * (right - left) / size**2).astype(np.float32)
