"""Encode probabilities as the codes that a label store keeps, and decode them.

A power codec keeps ``q = round(L · p^a)`` and reads it back as ``(q / L)^(1/a)``. Code
0 stands for ``0.35 · (0.5 / L)^(1/a)``, a probability between zero and the smallest
probability that rounds to 1. A row is renormalised to sum one after decoding. ``a < 1``
spends the codes on small probabilities, where a soft label says more than a hard label.

The float codecs keep the probability itself. They replace a zero, too: float16 by 0.35
of half its smallest step, float32 by its smallest normal number. So no decoded
probability is ever zero, and every KL is finite.

A tail codec is for many views in few bytes. Most classes are coded as zero. T, the sum
of their probabilities, is kept per row as ``t = round(M · √T)``. When decoded, the
classes coded as zero share ``(t / M)²`` evenly, and the other classes share the rest.
The dead zone, the range of p that is coded as zero, is wider than rounding alone would
make it: a class that shares T evenly costs next to nothing, and a lone code 1 among
zeros costs some ten bits. The program carries t as one more column of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cache.errors import StoreError

# greatest distance of a row's sum from one (a half-precision softmax is off by 5e-4)
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Codec:
    """A way to keep a row of probabilities. ``exponent`` a and ``levels`` L are those
    of the module's formula (floats: a = 1)."""

    name: str
    dtype: str  # name of the codes' type in numpy
    exponent: float
    levels: float
    # probability of code 0 before renormalisation; 0 in a tail codec, where code 0
    # decodes to a share of T
    zero: float
    tail: int = 0  # M of the module's formula; 0: the codec keeps no tail
    dead_zone: float = 0.5  # L · p^a below this is coded as zero
    compression: int = 3  # Zarr's zstd level

    @property
    def is_float(self) -> bool:
        """Return whether the codes are floating-point numbers."""
        return np.issubdtype(self.dtype, np.floating)

    @property
    def floor(self) -> float:
        """Return the probability below which a label says nothing that a student's
        output could be compared with: the least probability that isn't coded as zero.
        With fewer than 64 levels it is the edge between codes 1 and 2, since code 1
        alone stands for too wide a range."""
        return max(
            self.zero,
            ((self.dead_zone if self.levels >= 64 else 1.5) / self.levels) ** (1 / self.exponent),
        )

    def columns(self, classes: int) -> int:
        """Return the number of columns of a row of codes: one per class, and one more
        for a tail."""
        return classes + bool(self.tail)

    @cached_property
    def table(self) -> np.ndarray | None:
        """Return the probability of each code before renormalisation, float32
        [levels + 1]; None for the float codecs."""
        if self.is_float:
            return None
        values = (np.arange(int(self.levels) + 1) / self.levels) ** (1 / self.exponent)
        values[0] = self.zero
        return values.astype(np.float32)

    @property
    def values(self) -> np.ndarray:
        """Return the table of a codec that has a table."""
        assert self.table is not None, "a float codec has no table"
        return self.table

    def encode(self, probabilities: np.ndarray) -> np.ndarray:
        """Encode float32 [n, classes], rows summing to one → codes [n, ``columns``] of
        ``dtype``.

        Raises StoreError naming the first row that is no distribution (not finite,
        negative, sum off by over 1e-3), or whose codes would all be zero, which means
        "no label".
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
        """Encode float32 [n, classes] → codes [n, classes + 1]. The largest class
        always has a code above zero, so no row is empty, and T is below one."""
        scaled = np.float32(self.levels) * p ** np.float32(self.exponent)
        codes = np.where(
            scaled >= np.float32(self.dead_zone), np.rint(scaled).clip(1, self.levels), 0
        ).astype(self.dtype)
        largest = p.argmax(axis=1)[:, None]
        np.put_along_axis(codes, largest, np.maximum(np.take_along_axis(codes, largest, 1), 1), 1)
        mass = np.where(codes == 0, p, 0).sum(axis=1, dtype=np.float64)
        # Where a class is coded as zero, t is never 0, which would leave this class no
        # probability, and never M, which would leave the other classes none.
        tail = np.where(
            (codes == 0).any(axis=1), np.rint(self.tail * np.sqrt(mass)).clip(1, self.tail - 1), 0
        )
        return pack(codes, tail.astype(self.dtype))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes [n, ``columns``] → float32 [n, classes], every value above zero,
        rows summing to one."""
        if self.tail:
            zero = codes[:, :-1] == 0
            p = self.values[codes[:, :-1]]
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

    def possible(self, codes: np.ndarray) -> bool:
        """Return whether codes [n, ``columns``] can all be codes of this codec: no
        integer is beyond the codec's levels, and every float is a probability, not
        NaN."""
        if self.is_float:
            return bool(((codes >= 0) & (codes <= 1 + SUM_TOLERANCE)).all())
        classes = codes[:, :-1] if self.tail else codes
        return classes.max(initial=0) <= self.levels and (
            not self.tail or codes[:, -1].max(initial=0) < self.tail
        )

    def describe(self) -> dict[str, Any]:
        """Return the codec's part of the store's attributes: enough to decode labels
        without this project."""
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


def _power(name: str, exponent: float) -> Codec:
    return Codec(name, "uint8", exponent, 255, 0.35 * (0.5 / 255) ** (1 / exponent))


def _tail(name: str, levels: int) -> Codec:
    """Return a codec with a tail. Exponent, dead zone and M gave the best KL at equal
    bytes on labels of real teachers (tests/bench/rate_distortion.py)."""
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


def from_description(description: dict[str, Any]) -> Codec:
    """Return the codec that a store's attributes describe, by its parameters and not by
    its name. Raises StoreError if a parameter is missing."""
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
    """Join codes [n, classes] and tail [n] → [n, classes + 1], as a codec with a tail
    decodes them."""
    return np.concatenate([codes, tail[:, None]], axis=1)


def divergence(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(p‖q) in nats and total variation (0 … 1) per row, float64 [n] each. p
    and q are float [n, classes] with rows summing to one, and q > 0."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=1)
    return kl, np.abs(p - q).sum(axis=1) / 2


def entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy of each row, −Σ p·log p, in nats: float [n, classes] →
    float64 [n]."""
    logarithm = np.log(np.maximum(p, np.finfo(np.float32).tiny))
    return np.asarray(0.0 - np.sum(p * logarithm, axis=1, dtype=np.float64))
