"""Find where the values of a parquet column of byte strings lie, if they lie in the
file as they are: pages of encoding PLAIN, uncompressed.

Formats: page headers in Thrift's compact protocol, and the data pages 1 and 2, of
Apache Parquet's specification (parquet-format: README.md, Encodings.md,
parquet.thrift).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DATA, DICTIONARY, DATA_2 = 0, 2, 3  # types of a page
PLAIN = 0  # of the encodings
HEADER = 4096  # bytes that are read first for a page's header
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


class NotPlain(Exception):
    """A page whose values don't lie in the file as they are."""


class BadPage(Exception):
    """A page that can't be read: the file is damaged."""


class Short(BadPage):
    """Bytes that end before what they should hold."""


def values(
    read: Callable[[int, int], bytes], start: int, size: int, deepest: int
) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each value of a column chunk, (-1, 0) for a null.

    read: returns the bytes at an offset, of a length. start, size: of the chunk in the
    file, in bytes. deepest: the largest definition level of the column, that of a value
    that isn't null. Raises NotPlain or BadPage.
    """
    at, end = start, start + size
    while at < end:
        header, length = _header(read, at, end)
        kind, stored = header.get(1), header.get(3, -1)
        body = at + length
        if not 0 <= stored <= end - body:
            raise BadPage(f"a page at byte {at:,} is longer than its column")
        if kind == DICTIONARY:
            raise NotPlain
        if kind in (DATA, DATA_2):
            yield from _page(read, header, body, stored, deepest)
        at = body + stored


def _page(
    read: Callable[[int, int], bytes], header: dict, body: int, size: int, deepest: int
) -> Iterator[tuple[int, int]]:
    about = header.get(5 if header[1] == DATA else 8)
    if not isinstance(about, dict):
        raise BadPage(f"the page at byte {body:,} has no description")
    if about.get(2 if header[1] == DATA else 4) != PLAIN or header.get(2) != size:
        raise NotPlain
    count, at = about.get(1, 0), body
    if header[1] == DATA:
        levels = b""
        if deepest:
            (length,) = struct.unpack("<I", read(at, 4))
            levels, at = read(at + 4, min(length, size)), at + 4 + length
    else:
        repeated, defined = about.get(6, 0), about.get(5, 0)
        levels = read(at + repeated, defined)
        at += repeated + defined
    there = _levels(levels, count, deepest.bit_length()) == deepest if deepest else [True] * count
    for full in there:
        if not full:
            yield -1, 0
            continue
        if at + 4 > body + size:
            raise BadPage(f"the page at byte {body:,} ends before its values")
        (length,) = struct.unpack("<I", read(at, 4))
        if at + 4 + length > body + size:
            raise BadPage(f"a value at byte {at:,} is longer than its page")
        yield at + 4, length
        at += 4 + length


def _levels(data: bytes, count: int, bits: int) -> np.ndarray:
    """Decode definition levels: runs of one value, and values packed in ``bits`` bits
    (parquet's hybrid of RLE and bit packing). Returns int64 [count]."""
    found, at = np.zeros(count, np.int64), 0
    done = 0
    while done < count:
        run, at = _varint(data, at)
        if run & 1:
            n = (run >> 1) * 8
            packed = np.frombuffer(data, np.uint8, n * bits // 8, at)
            at += len(packed)
            ones = np.unpackbits(packed, bitorder="little").reshape(-1, bits)
            several = ones @ (1 << np.arange(bits))
        else:
            n, width = run >> 1, -(-bits // 8)
            several = np.full(n, int.from_bytes(data[at : at + width], "little"))
            at += width
        if not n:
            raise BadPage("a run of no levels")
        here = several[: count - done]
        found[done : done + len(here)] = here
        done += len(here)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise Short("a number is cut off")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _header(read: Callable[[int, int], bytes], at: int, end: int) -> tuple[dict[int, Any], int]:
    """Read a page's header. Returns its fields by number, and its length in bytes.

    A header is some 30 bytes long, or, with statistics, as long as two of the values.
    """
    ahead = HEADER
    while True:
        try:
            return _struct(read(at, min(ahead, end - at)), 0)
        except Short:
            if ahead >= end - at:
                raise
            ahead *= 16


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while True:
        if at >= len(data):
            raise Short("a page's header is cut off")
        kind, step = data[at] & 0x0F, data[at] >> 4
        at += 1
        if kind == 0:
            return fields, at
        if step:
            number += step
        else:
            raw, at = _varint(data, at)
            number = _signed(raw)
        if kind in (TRUE, FALSE):
            fields[number] = kind == TRUE
        else:
            fields[number], at = _value(data, at, kind)


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (I16, I32, I64):
        raw, at = _varint(data, at)
        return _signed(raw), at
    if kind == BINARY:
        length, at = _varint(data, at)
        if at + length > len(data):
            raise Short("a text is cut off")
        return data[at : at + length], at + length
    if kind == STRUCT:
        return _struct(data, at)
    if kind == DOUBLE:
        return None, at + 8
    if kind in (TRUE, FALSE, BYTE):
        return None, at + 1
    if kind in (LIST, SET):
        if at >= len(data):
            raise Short("a list is cut off")
        size, inner = data[at] >> 4, data[at] & 0x0F
        at += 1
        if size == 15:
            size, at = _varint(data, at)
        several = []
        for _ in range(size):
            one, at = _value(data, at, inner)
            several.append(one)
        return several, at
    raise BadPage(f"a field of type {kind}")


def _signed(raw: int) -> int:
    return (raw >> 1) ^ -(raw & 1)
