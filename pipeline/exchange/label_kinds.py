"""Expand the kinds of stored labels that other programs have to probabilities, and
shorten probabilities to these kinds.

Kinds have FKD's names. With p the mean softmax of each crop, labels of a kind are:

    full                     float [n, classes]   p
    marginal_smoothing_kK    float [n, 2, K]      the K likeliest classes and their
                                                  probabilities; the rest is even
                                                  over the others (K is 5 or 10)
    marginal_renorm_kK       float [n, 2, K]      the same file; the rest is nothing,
                                                  and the K are scaled to sum to one
    smoothing                float [n, 2]         as marginal_smoothing, with one class
    hard                     int [n]              the likeliest class alone
"""

from __future__ import annotations

import numpy as np

SUM = 5e-3  # excess of a label's sum above 1 that the rounding of half precision explains
KINDS = {"full": 0, "top5": 5, "top10": 10}  # classes kept in a written label; 0: all


def kind_of(labels: np.ndarray, classes: int) -> str | None:
    """Return the kind of label that an array holds; None if it holds no kind."""
    shape = labels.shape[1:]
    if (
        labels.dtype.kind == "f"
        and shape == (2,)
        and classes == 2
        and (labels[:, 0] == np.rint(labels[:, 0])).all()
    ):
        return None  # either the likeliest class and its probability, or two probabilities
    if labels.dtype.kind == "f" and shape == (classes,):
        return "full"
    if labels.dtype.kind == "f" and len(shape) == 2 and shape[0] == 2 and 1 <= shape[1] <= classes:
        return f"marginal_smoothing_k{shape[1]}"
    if labels.dtype.kind == "f" and shape == (2,):
        return "smoothing"
    whole = labels.dtype.kind in "iu" or (
        # the generator's half precision makes floats of class numbers, too
        labels.dtype.kind == "f" and (labels == np.rint(labels)).all()
    )
    return "hard" if shape == () and whole else None


def renamed(kind: str, rest: str) -> str:
    """Return the kind of labels whose rest is "even", as ``kind_of`` assumes, or
    "none": FKD writes the same files for both."""
    if rest == "even":
        return kind
    if kind == "smoothing":
        return "marginal_renorm_k1"
    return kind.replace("marginal_smoothing", "marginal_renorm")


def dense(labels: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """Expand labels of a kind to float32 [n, classes], rows summing to one.

    Raises ValueError, with the reason, for labels that are no probabilities of these
    classes.
    """
    if kind == "full":
        return _scaled(labels.astype(np.float32))
    n = len(labels)
    ids, p = (
        (labels[:, None], np.ones((n, 1)))
        if kind == "hard"
        else (labels.reshape(n, 2, -1)[:, 0], labels.reshape(n, 2, -1)[:, 1])
    )
    if labels.dtype == np.float16 and classes > 2048:
        raise ValueError("half precision rounds class numbers above 2,048")
    index = ids.astype(np.int64)
    if not (
        np.isfinite(ids).all()
        and (index == ids).all()
        and (index >= 0).all()
        and (index < classes).all()
    ):
        raise ValueError(f"class numbers that are not from 0 to {classes - 1}")
    if any(len(set(row)) < len(row) for row in index.tolist()):
        raise ValueError("a class that is named twice")
    p = p.astype(np.float32)
    rest = 1 - p.sum(axis=1, keepdims=True)
    if not (np.isfinite(p).all() and (p >= 0).all() and (rest >= -SUM).all()):
        raise ValueError("probabilities below zero, or whose sum is above one")
    if kind.startswith("marginal_renorm"):
        rest, total = np.zeros_like(rest), p.sum(axis=1, keepdims=True)
        if not (total > 0).all():
            raise ValueError("a label without any probability")
        p = p / total
    out = np.repeat(np.maximum(rest, 0) / max(1, classes - index.shape[1]), classes, axis=1).astype(
        np.float32
    )
    np.put_along_axis(out, index, p, axis=1)
    return _scaled(out)


def _scaled(p: np.ndarray) -> np.ndarray:
    total = p.sum(axis=1, keepdims=True)
    if not (np.isfinite(p).all() and (p >= 0).all() and (np.abs(total - 1) < 2 * SUM).all()):
        raise ValueError("probabilities below zero, or whose sum is not one")
    return p / total


def sparse(p: np.ndarray, kept: int) -> np.ndarray:
    """Return probabilities float32 [n, classes] in the form that a label file holds.

    kept: the number of classes to keep. Returns float32 [n, 2, kept], the likeliest
    classes and their probabilities, the likeliest first. With 0, returns the
    probabilities as they are.
    """
    if kept == 0:
        return p
    # Partitioning takes a tenth of the time of sorting all classes.
    index = np.argpartition(-p, kept - 1, axis=1)[:, :kept]
    order = np.argsort(-np.take_along_axis(p, index, axis=1), axis=1, kind="stable")
    index = np.take_along_axis(index, order, axis=1)
    return np.stack([index.astype(np.float32), np.take_along_axis(p, index, axis=1)], axis=1)
