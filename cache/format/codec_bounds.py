"""Bound the loss of a codec, with proofs for every row of probabilities: the largest
error, the sums that decoded rows can have, and the distance of a row from the rows that
have given codes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cache.format.codec import SUM_TOLERANCE, Codec


@lru_cache(maxsize=64)
def max_error(codec: Codec, classes: int) -> tuple[float, float]:
    """Return the stated error, which no row of so many classes exceeds: (KL(p‖p̂) in
    nats, total variation).

    With d the decoded values before renormalisation and S their sum,
    KL = Σ p·log(p/d) + log S, and log S ≤ log s + S/s − 1 for any s > 0. The bound is a
    sum over classes, so Lagrange duality bounds it over all rows with Σp = 1:
    KL ≤ log s − 1 + λ + classes · max_p (p·log(p/d) + d/s − λp), for any s and λ. The
    maximum over p is reached at the edges of the rounding cells, where the term is
    convex. Total variation follows by Pinsker: TV ≤ √(KL/2).
    """
    if codec.tail:
        return _max_error_with_tail(codec, classes)
    low, high, decoded = _cells(codec)
    edges = np.concatenate([low, high])
    d = np.concatenate([decoded, decoded])
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(edges > 0, edges * np.log(edges / d), 0.0)
    best = np.inf
    span = float(np.max(np.abs(high - decoded) / np.maximum(decoded, 1e-300)))
    for s in np.linspace(1 - min(0.5, span), 1 + min(0.5, span), 41):

        def bound(multiplier: float, s: float = s) -> float:
            return np.log(s) - 1 + multiplier + classes * np.max(gain + d / s - multiplier * edges)

        # The bound is convex in the multiplier: search for its minimum by thirds.
        left, right = 0.0, 4.0
        for _ in range(60):
            third = (right - left) / 3
            if bound(left + third) < bound(right - third):
                right -= third
            else:
                left += third
        best = min(best, bound((left + right) / 2))
    kl = max(float(best), 0.0) + 1e-6  # 1e-6: the rounding of float32 arithmetic itself
    return kl, float(np.sqrt(kl / 2))


def _max_error_with_tail(codec: Codec, classes: int) -> tuple[float, float]:
    """Return the stated error of a codec with a tail, as ``max_error`` does.

    Let A be the coded classes, Z the others, T the sum of p over Z, T̂ what is decoded
    for T, S the sum of d over A, and e the edge of the dead zone. Then

        KL = kl(T‖T̂) + [Σ_A p·log(p/d) + (1−T)·log(S/(1−T))]
             + [Σ_Z p·log p − T·log T + T·log |Z|],

    where kl is the KL of two coins. The second term is bounded as in ``max_error``,
    with (1−T)·log(S/(1−T)) ≤ (1−T)(log s − 1) + S/s. The third term is at most
    T·log(C·e/T) with C classes, since p ≤ e in Z. The whole is maximised over T in the
    cells of t. (If the largest class is below e, A is this class alone, and the second
    term is zero.)
    """
    low, high, decoded = (column[1:] for column in _cells(codec))
    edge = low[0]
    p, d = np.concatenate([low, high]), np.concatenate([decoded, decoded])
    gain = p * np.log(p / d)
    t = np.arange(1, codec.tail)
    estimate = (t / codec.tail) ** 2
    first, last = ((t - 0.5) / codec.tail) ** 2, ((t + 0.5) / codec.tail) ** 2
    first[0], last[-1] = 0.0, 1.0
    # The largest class is never in Z, and no class in Z is above e.
    limit = min(1 - 1 / classes, (classes - 1) * edge)
    estimate, first, last = (
        column[first < limit] for column in (estimate, first, np.minimum(last, limit))
    )
    # Divide the cells of T into pieces. In a piece the first term, which is convex, is
    # at most the larger of its values at the cell's ends. The second term is linear in
    # T. The third term, T·log(K/T) with K = C·e, rises up to T = K/exp(1) and falls
    # from there.
    left = first[:, None] + (last - first)[:, None] * np.linspace(0, 1, 33)[None, :-1]
    right = left + ((last - first) / 32)[:, None]
    top = classes * edge / np.e

    def coin(T: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(T > 0, T * np.log(T / estimate), 0) + np.where(
                T < 1, (1 - T) * np.log((1 - T) / (1 - estimate)), 0
            )

    worst = np.maximum(coin(first), coin(last))
    at = np.maximum(np.clip(top, left, right), np.finfo(float).tiny)
    shared = np.maximum(0, at * np.log(classes * edge / at))
    best = np.full(len(first), np.inf)
    span = float(np.max(np.maximum(high / decoded, decoded / low))) - 1
    for s in np.linspace(1 - min(0.5, span), 1 + min(0.5, span), 41):
        slack = gain + d / s
        for multiplier in np.linspace(-1, 2, 121):
            most = classes * max(0.0, float(np.max(slack - multiplier * p)))
            coded = (
                np.maximum(
                    (1 - left) * (np.log(s) - 1 + multiplier),
                    (1 - right) * (np.log(s) - 1 + multiplier),
                )
                + most
            )
            best = np.minimum(best, (np.maximum(coded, 0) + shared).max(axis=1))
    kl = float((worst + best).max()) + 1e-6
    # Total variation by Pinsker; by Bretagnolle and Huber where KL is large.
    return kl, float(min(np.sqrt(kl / 2), np.sqrt(1 - np.exp(-kl))))


@lru_cache(maxsize=64)
def sum_range(codec: Codec, classes: int) -> tuple[float, float]:
    """Return the least and the greatest sum of the decoded values, before
    renormalisation, of any row that sums to one.

    Let d be the value to which the cell [low, high] decodes. By Lagrange duality,
    Σd ≤ λ + classes · max (d − λ·low) and Σd ≥ λ + classes · min (d − λ·high) for any λ
    ≥ 0, over all cells. Both bounds are widened by the most that a row's sum may differ
    from one (``SUM_TOLERANCE``).

    With a tail the sum is that of the coded classes and of T. A class in the tail adds
    its own probability, T is off by its rounding, and the largest class may be below
    its code.
    """
    low, high, decoded = _cells(codec)
    miss = 2 * SUM_TOLERANCE
    if codec.tail:
        low, high, decoded = low[1:], high[1:], decoded[1:]
        miss += 2 / codec.tail + decoded[0]
        multipliers = np.linspace(0, 2, 801)[:, None]
        # Bound Σ(d − p) over the coded classes, where p is low or more. The maximum
        # with 0 is for classes that are not coded.
        gain = np.maximum(0, np.max(decoded - low - multipliers * low, axis=1))
        loss = np.maximum(0, np.max(high - decoded - multipliers * low, axis=1))
        most, least = ((multipliers[:, 0] + classes * part).min() for part in (gain, loss))
        return 1 - float(least) - miss, 1 + float(most) + miss
    multipliers = np.concatenate(
        [np.linspace(0, 4, 401), 1 + np.geomspace(1e-6, 1, 100), 1 - np.geomspace(1e-6, 1, 100)]
    )[:, None]
    most = (multipliers[:, 0] + classes * np.max(decoded - multipliers * low, axis=1)).min()
    least = (multipliers[:, 0] + classes * np.min(decoded - multipliers * high, axis=1)).max()
    return float(least) - miss, float(most) + miss


def plausible(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Return whether codes [n, ``columns``] can be those of probabilities that sum to
    one (``sum_range``): bool [n]."""
    if codec.tail:
        low, high = sum_range(codec, codes.shape[1] - 1)
        mass = np.where((codes[:, :-1] == 0).any(axis=1), (codes[:, -1] / codec.tail) ** 2, 0)
        sums = codec.values[codes[:, :-1]].sum(axis=1, dtype=np.float64) + mass
        return (sums >= low) & (sums <= high) & (codes[:, -1] < codec.tail)
    low, high = sum_range(codec, codes.shape[1])
    p = codes.astype(np.float64) if codec.table is None else codec.table[codes]
    sums = np.maximum(p, codec.zero).sum(axis=1, dtype=np.float64)
    return (sums >= low) & (sums <= high) & np.isfinite(sums)


def distance(codec: Codec, p: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return how far p is, at least, from every row with these codes: total variation
    (0 … 1), float64 [n].

    p: float [n, classes], rows summing to one. codes: [n, ``columns``]. The distance is
    zero where these are the codes of p. A code beside p's own costs only the distance
    of p from the code's cell.

    Total variation is the sum, over all classes, of the excess of one row over the
    other. So it is at least the excess of p over the cells' upper edges, at least the
    lack of p below their lower edges, and, for the classes coded as zero, at least the
    distance of their sum from the cell of t.
    """
    p, tail = p.astype(np.float64), codes[:, -1]
    codes = codes[:, :-1] if codec.tail else codes
    if codec.dtype == "float32":
        low, high = codes * (1 - 2.0**-24), codes * (1 + 2.0**-24)
    else:
        lows, highs, _ = _cells(codec)
        at = codes.view(np.uint16).clip(0, len(lows) - 1) if codec.is_float else codes
        low, high = lows[at], highs[at]
    if codec.tail:
        # A largest class in the dead zone is coded nevertheless.
        low[(codes > 0).sum(axis=1) == 1] = 0
    apart = np.maximum(np.maximum(p - high, 0).sum(axis=1), np.maximum(low - p, 0).sum(axis=1))
    if codec.tail:
        zero = codes == 0
        mass, t = np.where(zero, p, 0).sum(axis=1), tail.astype(np.float64)
        least = np.where(t <= 1, 0, ((t - 0.5) / codec.tail) ** 2)
        most = np.where(t >= codec.tail - 1, 1, ((t + 0.5) / codec.tail) ** 2)
        apart = np.maximum(
            apart, np.where(zero.any(axis=1), np.maximum(mass - most, least - mass), 0)
        )
    return apart


def _cells(codec: Codec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lowest and the highest probability that each code stands for, and the
    value to which the code decodes: float64 [cells] each."""
    if codec.dtype == "float32":
        # Sample the 2^30 codes: above the smallest their relative error is 2^-24
        # everywhere.
        edges = np.concatenate([[0.0], np.geomspace(codec.zero, 1.0, 4096)])
        return edges * (1 - 2.0**-24), edges * (1 + 2.0**-24), np.maximum(edges, codec.zero)
    if codec.dtype == "float16":
        halves = np.arange(0, 0x3C01, dtype=np.uint16).view(np.float16)
        codes: np.ndarray = halves.astype(np.float64)  # 0 … 1.0
        middle = (codes[1:] + codes[:-1]) / 2
    else:
        steps = np.arange(int(codec.levels) + 1)
        codes = (steps / codec.levels) ** (1 / codec.exponent)
        middle = ((steps[1:] - 0.5) / codec.levels) ** (1 / codec.exponent)
        middle[0] = (codec.dead_zone / codec.levels) ** (1 / codec.exponent)
    decoded = codes.copy()
    decoded[0] = codec.zero
    return np.concatenate([[0.0], middle]), np.concatenate([middle, [1.0]]), decoded
