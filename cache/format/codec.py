"""Probabilities ↔ the codes that a label store keeps.

A power codec keeps ``q = round(L · p^a)`` and reads it back as ``(q / L)^(1/a)``; code
0 stands for ``0.35 · (0.5 / L)^(1/a)``, a probability between zero and the smallest
that rounds to 1. A row is renormalised to sum one after decoding. ``a < 1`` spends the
codes on small probabilities, where a soft label carries what a hard one doesn't. The
float codecs keep the probability itself, and replace a zero in the same way, by 0.35 of
half their smallest step, so that no decoded probability is ever zero and every KL is
finite.

A tail codec is for many views in few bytes. Most classes are coded as zero, and what
they have together, T, is kept per row as ``t = round(M · √T)``: decoded, they share
``(t / M)²`` evenly, and the others share the rest. Its dead zone is wider than rounding
would have it, since a class that is shared evenly costs next to nothing, and a lone
code 1 among zeros some ten bits. The codes travel through the program with t as one
more column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from cache.errors import StoreError

# a row of probabilities may miss one by this much (half-precision softmax misses it by
# 5e-4)
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Codec:
    """One way to keep a row of probabilities. ``exponent`` a and ``levels`` L are those
    of the module's formula (floats: a = 1)."""

    name: str
    dtype: str  # numpy name of the stored codes
    exponent: float
    levels: float
    # what code 0 decodes to, before renormalisation; with a tail, code 0 is no
    # probability of its own
    zero: float
    tail: int = 0  # M of the module's formula; 0: the codec keeps no tail
    dead_zone: float = 0.5  # L · p^a below this is coded as zero
    compression: int = 3  # Zarr's zstd level

    @property
    def is_float(self) -> bool:
        return np.issubdtype(self.dtype, np.floating)

    @property
    def floor(self) -> float:
        """The probability below which labels carry nothing that a student's output
        could be compared with: the least that isn't coded as zero; with few levels the
        edge between codes 1 and 2, since code 1 alone stands for too much."""
        return max(
            self.zero,
            ((self.dead_zone if self.levels >= 64 else 1.5) / self.levels) ** (1 / self.exponent),
        )

    def columns(self, classes: int) -> int:
        """Columns of a row of codes: one a class, and one for the tail where there is
        one."""
        return classes + bool(self.tail)

    @cached_property
    def table(self) -> np.ndarray | None:
        """float32 [levels + 1]: the probability of each code before renormalisation;
        None for the float codecs."""
        if self.is_float:
            return None
        values = (np.arange(int(self.levels) + 1) / self.levels) ** (1 / self.exponent)
        values[0] = self.zero
        return values.astype(np.float32)

    def encode(self, probabilities: np.ndarray) -> np.ndarray:
        """float32 [n, classes], rows summing to one → codes [n, ``columns``] of
        ``dtype``.

        Raises StoreError naming the first row that is no distribution (not finite,
        negative, sum off by over 1e-3) or that would be coded as nothing but zeros,
        which means "no label".
        """
        p = np.asarray(probabilities, dtype=np.float32)
        sums = p.sum(axis=1, dtype=np.float64)
        wrong = ~(np.abs(sums - 1) <= SUM_TOLERANCE) | ~(p.min(axis=1) >= 0)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise StoreError(
                f"row {row} of a batch is no probability distribution: sum {sums[row]:.6g}, "
                f"minimum {p[row].min():.3g}, {int((~np.isfinite(p[row])).sum())} values not "
                "finite; the teachers' outputs must be checked"
            )
        if self.is_float:
            codes = p.astype(self.dtype)
        elif self.tail:
            codes = self._with_tail(p)
        else:
            codes = (
                np.rint(np.float32(self.levels) * p ** np.float32(self.exponent))
                .clip(0, self.levels)
                .astype(self.dtype)
            )
        empty = ~codes.any(axis=1)
        if empty.any():
            raise StoreError(
                f"row {int(np.argmax(empty))} of a batch has no probability large enough for "
                f"codec {self.name} at {p.shape[1]} classes; choose a finer store.codec"
            )
        return codes

    def _with_tail(self, p: np.ndarray) -> np.ndarray:
        """float32 [n, classes] → codes [n, classes + 1]. The largest class always has a
        code, so that a row is never empty and T is below one."""
        scaled = np.float32(self.levels) * p ** np.float32(self.exponent)
        codes = np.where(
            scaled >= np.float32(self.dead_zone), np.rint(scaled).clip(1, self.levels), 0
        ).astype(self.dtype)
        largest = p.argmax(axis=1)[:, None]
        np.put_along_axis(codes, largest, np.maximum(np.take_along_axis(codes, largest, 1), 1), 1)
        mass = np.where(codes == 0, p, 0).sum(axis=1, dtype=np.float64)
        # Never 0 or M where a class is coded as zero: it would have no probability, or
        # the others none.
        tail = np.where(
            (codes == 0).any(axis=1), np.rint(self.tail * np.sqrt(mass)).clip(1, self.tail - 1), 0
        )
        return pack(codes, tail.astype(self.dtype))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes [n, ``columns``] → float32 [n, classes], every value above zero, rows
        summing to one."""
        if self.tail:
            zero = codes[:, :-1] == 0
            p = self.table[codes[:, :-1]]
            zeros = zero.sum(axis=1)
            mass = np.where(zeros > 0, (codes[:, -1] / np.float32(self.tail)) ** 2, 0).astype(
                np.float32
            )
            p *= (
                (1 - mass) / np.maximum(p.sum(axis=1, dtype=np.float32), np.finfo(np.float32).tiny)
            )[:, None]
            return np.where(zero, (mass / np.maximum(zeros, 1)).astype(np.float32)[:, None], p)
        p = codes.astype(np.float32) if self.table is None else self.table[codes]
        if self.table is None:
            np.maximum(p, np.float32(self.zero), out=p)
        return p / p.sum(axis=1, keepdims=True, dtype=np.float32)

    def distance(self, p: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """float [n, classes], rows summing to one, and codes [n, ``columns``] → float64
        [n]: the least total variation between p and a row that is coded so, 0 … 1. Zero
        where these are the codes of p; a code beside p's own costs only what p is away
        from its cell.

        Total variation is the sum of what one row has more than the other, over all
        classes, and so at least what p has above the cells' upper edges, what it lacks
        to their lower ones, and what the classes coded as zero have together beyond the
        cell of t.
        """
        p, tail = p.astype(np.float64), codes[:, -1] if self.tail else None
        codes = codes[:, :-1] if self.tail else codes
        if self.dtype == "float32":
            low, high = codes * (1 - 2.0**-24), codes * (1 + 2.0**-24)
        else:
            lows, highs, _ = self._cells()
            at = codes.view(np.uint16).clip(0, len(lows) - 1) if self.is_float else codes
            low, high = lows[at], highs[at]
        if self.tail:
            low[(codes > 0).sum(axis=1) == 1] = (
                0  # a largest class in the dead zone is coded nevertheless
            )
        apart = np.maximum(np.maximum(p - high, 0).sum(axis=1), np.maximum(low - p, 0).sum(axis=1))
        if self.tail:
            zero = codes == 0
            mass, t = np.where(zero, p, 0).sum(axis=1), tail.astype(np.float64)
            least = np.where(t <= 1, 0, ((t - 0.5) / self.tail) ** 2)
            most = np.where(t >= self.tail - 1, 1, ((t + 0.5) / self.tail) ** 2)
            apart = np.maximum(
                apart, np.where(zero.any(axis=1), np.maximum(mass - most, least - mass), 0)
            )
        return apart

    def possible(self, codes: np.ndarray) -> bool:
        """Whether all of codes [n, ``columns``] are codes of this codec: none is beyond
        its levels, and no float is none."""
        if self.is_float:
            return bool(((codes >= 0) & (codes <= 1 + SUM_TOLERANCE)).all())
        classes = codes[:, :-1] if self.tail else codes
        return classes.max(initial=0) <= self.levels and (
            not self.tail or codes[:, -1].max(initial=0) < self.tail
        )

    def plausible(self, codes: np.ndarray) -> np.ndarray:
        """bool [n]: whether codes [n, classes] can be those of probabilities that sum
        to one (``sum_range``)."""
        if self.tail:
            low, high = self.sum_range(codes.shape[1] - 1)
            mass = np.where((codes[:, :-1] == 0).any(axis=1), (codes[:, -1] / self.tail) ** 2, 0)
            sums = self.table[codes[:, :-1]].sum(axis=1, dtype=np.float64) + mass
            return (sums >= low) & (sums <= high) & (codes[:, -1] < self.tail)
        low, high = self.sum_range(codes.shape[1])
        p = codes.astype(np.float64) if self.table is None else self.table[codes]
        sums = np.maximum(p, self.zero).sum(axis=1, dtype=np.float64)
        return (sums >= low) & (sums <= high) & np.isfinite(sums)

    @lru_cache(maxsize=64)  # noqa: B019 - as max_error
    def sum_range(self, classes: int) -> tuple[float, float]:
        """Least and greatest sum of the decoded values, before renormalisation, of any
        row that sums to one.

        By Lagrange duality, d being what the cell [low, high] decodes to: Σd ≤ λ +
        classes · max (d − λ·low) and Σd ≥ λ + classes · min (d − λ·high) for any λ ≥ 0,
        over all cells. Both are widened by what a row's sum may miss one by
        (``SUM_TOLERANCE``). With a tail the sum is that of the coded classes and of T:
        a class in the tail adds what it has, T itself misses by its rounding, and the
        largest class may be below its code.
        """
        low, high, decoded = self._cells()
        miss = 2 * SUM_TOLERANCE
        if self.tail:
            low, high, decoded = low[1:], high[1:], decoded[1:]
            miss += 2 / self.tail + decoded[0]
            multipliers = np.linspace(0, 2, 801)[:, None]
            # Σ(d − p) over the coded classes, each of which has low or more, so that
            # none may be coded too.
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

    def describe(self) -> dict:
        """What the store's attributes say of the codec: enough to decode without this
        project."""
        if self.is_float:
            formula = "p = max(q, zero); p = p / sum(p)"
        elif self.tail:
            formula = (
                "T = (t / M) ** 2 with M = codec.tail, t = tail[view, image], or T = 0 if no q is "
                "0; p = (q / levels) ** (1 / exponent) where q > 0, "
                "scaled to the sum 1 - T; p = T / (number of classes with q = 0) where q = 0"
            )
        else:
            formula = (
                "p = (q / levels) ** (1 / exponent) where q > 0, p = zero where q = 0; p = p / "
                "sum(p)"
            )
        return {
            "name": self.name,
            "dtype": self.dtype,
            "exponent": self.exponent,
            "levels": self.levels,
            "zero": self.zero,
            "formula": formula,
            **(
                {"tail": self.tail, "dead_zone": self.dead_zone, "compression": self.compression}
                if self.tail
                else {}
            ),
        }

    @lru_cache(maxsize=64)  # noqa: B019 - codecs are few, frozen and live as long as the process
    def max_error(self, classes: int) -> tuple[float, float]:
        """The stated error for rows of so many classes: (KL(p‖p̂) in nats, total
        variation), which no row exceeds.

        With d the decoded values before renormalisation and S their sum, KL = Σ
        p·log(p/d) + log S, and log S ≤ log s + S/s − 1 for any s > 0. That is a sum
        over classes, so Lagrange duality bounds it over all rows with Σp = 1: KL ≤ log
        s − 1 + λ + classes · max_p (p·log(p/d) + d/s − λp), for any s and λ. The
        maximum over p is reached at the edges of the rounding cells, where the term is
        convex. Total variation follows by Pinsker: TV ≤ √(KL/2).
        """
        if self.tail:
            return self._max_error_with_tail(classes)
        low, high, decoded = self._cells()
        edges = np.concatenate([low, high])
        d = np.concatenate([decoded, decoded])
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(edges > 0, edges * np.log(edges / d), 0.0)
        best = np.inf
        span = float(np.max(np.abs(high - decoded) / np.maximum(decoded, 1e-300)))
        for s in np.linspace(1 - min(0.5, span), 1 + min(0.5, span), 41):

            def bound(multiplier: float, s: float = s) -> float:
                return (
                    np.log(s) - 1 + multiplier + classes * np.max(gain + d / s - multiplier * edges)
                )

            left, right = (
                0.0,
                4.0,
            )  # the bound is convex in the multiplier: narrow it down by thirds
            for _ in range(60):
                third = (right - left) / 3
                if bound(left + third) < bound(right - third):
                    right -= third
                else:
                    left += third
            best = min(best, bound((left + right) / 2))
        kl = max(float(best), 0.0) + 1e-6  # 1e-6: the rounding of float32 arithmetic itself
        return kl, float(np.sqrt(kl / 2))

    def _max_error_with_tail(self, classes: int) -> tuple[float, float]:
        """Let A be the coded classes, Z the others with the sum T, T̂ what is decoded
        for T, S the sum of d over A, and e the edge of the dead zone. Then

            KL = kl(T‖T̂) + [Σ_A p·log(p/d) + (1−T)·log(S/(1−T))]
                 + [Σ_Z p·log p − T·log T + T·log |Z|],

        kl being that of two coins. The second term is bounded as in ``max_error``, with
        (1−T)·log(S/(1−T)) ≤ (1−T)(log s − 1) + S/s; the third is at most T·log(C·e/T),
        since p ≤ e in Z. The whole is maximised over T in the cells of t. (If the
        largest class is below e, A is that class alone, and the second term zero.)
        """
        low, high, decoded = (column[1:] for column in self._cells())
        edge = low[0]
        p, d = np.concatenate([low, high]), np.concatenate([decoded, decoded])
        gain = p * np.log(p / d)
        t = np.arange(1, self.tail)
        estimate = (t / self.tail) ** 2
        first, last = ((t - 0.5) / self.tail) ** 2, ((t + 0.5) / self.tail) ** 2
        first[0], last[-1] = 0.0, 1.0
        limit = min(
            1 - 1 / classes, (classes - 1) * edge
        )  # the largest class is never in Z, and no other there above e
        estimate, first, last = (
            column[first < limit] for column in (estimate, first, np.minimum(last, limit))
        )
        # T in pieces of its cells. In a piece the first term is at most the larger of
        # its cell's ends, being convex; the second is linear in T; and the third,
        # T·log(K/T), rises up to K/e and falls from there.
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
        return kl, float(
            min(np.sqrt(kl / 2), np.sqrt(1 - np.exp(-kl)))
        )  # Pinsker; Bretagnolle and Huber where KL is large

    def _cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float64 [cells] each: lowest and highest probability that a code stands for,
        and what it decodes to."""
        if (
            self.dtype == "float32"
        ):  # 2^30 codes; their relative error is 2^-24 everywhere above the smallest
            edges = np.concatenate([[0.0], np.geomspace(self.zero, 1.0, 4096)])
            return edges * (1 - 2.0**-24), edges * (1 + 2.0**-24), np.maximum(edges, self.zero)
        if self.dtype == "float16":
            codes = (
                np.arange(0, 0x3C01, dtype=np.uint16).view(np.float16).astype(np.float64)
            )  # 0 … 1.0
            middle = (codes[1:] + codes[:-1]) / 2
        else:
            steps = np.arange(int(self.levels) + 1)
            codes = (steps / self.levels) ** (1 / self.exponent)
            middle = ((steps[1:] - 0.5) / self.levels) ** (1 / self.exponent)
            middle[0] = (self.dead_zone / self.levels) ** (1 / self.exponent)
        decoded = codes.copy()
        decoded[0] = self.zero
        return np.concatenate([[0.0], middle]), np.concatenate([middle, [1.0]]), decoded


def _power(name: str, exponent: float) -> Codec:
    return Codec(name, "uint8", exponent, 255, 0.35 * (0.5 / 255) ** (1 / exponent))


def _tail(name: str, levels: int) -> Codec:
    """Exponent, dead zone and M are those of the best KL at equal bytes on labels of
    real teachers (tests/bench/rate_distortion.py)."""
    return Codec(name, "uint8", 2 / 3, levels, 0.0, tail=127, dead_zone=0.75, compression=19)


CODECS = {
    codec.name: codec
    for codec in (
        _power("cbrt8", 1 / 3),
        _power("pow8", 0.4),
        _power("sqrt8", 1 / 2),
        _tail("tail255", 255),
        _tail("tail80", 80),
        _tail("tail40", 40),
        Codec("float16", "float16", 1.0, 2.0**24, 0.35 * 2.0**-25),
        Codec("float32", "float32", 1.0, 2.0**126, 2.0**-126),
    )
}
DEFAULT = "pow8"


def from_description(description: dict) -> Codec:
    """The codec that a store's attributes describe, by its parameters and not by its
    name. Raises StoreError if incomplete."""
    try:
        return Codec(
            **{key: description[key] for key in ("name", "dtype", "exponent", "levels", "zero")},
            **{
                key: description[key]
                for key in ("tail", "dead_zone", "compression")
                if key in description
            },
        )
    except KeyError as missing:
        raise StoreError(
            f"the store's codec has no {missing}; the store was made by something else, or its "
            f"zarr.json is damaged"
        ) from None


def pack(codes: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Codes [n, classes] and tail [n] → [n, classes + 1], as a codec with a tail
    decodes them."""
    return np.concatenate([codes, tail[:, None]], axis=1)


def divergence(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [n, classes] twice, rows summing to one, q > 0 → per row float64 [n]:
    KL(p‖q) in nats, and total variation (0 … 1)."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=1)
    return kl, np.abs(p - q).sum(axis=1) / 2


def entropy(p: np.ndarray) -> np.ndarray:
    """float [n, classes] → float64 [n]: −Σ p·log p, in nats."""
    return 0.0 - np.sum(
        p * np.log(np.maximum(p, np.finfo(np.float32).tiny)), axis=1, dtype=np.float64
    )
