"""Compare a fetched file with the digest that a store's tag of its contents may be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MIB, MB = 1 << 20, 10**6
BLOCK = 1 << 20  # bytes that are read at once
# Sizes of parts by which programs usually upload a large file.
PARTS = (
    *(n * MIB for n in (5, 6, 7, 8, 10, 12, 15, 16, 20, 24, 25, 32, 40, 48, 50, 60, 64, 80, 96)),
    *(n * MIB for n in (100, 120, 128, 150, 200, 250, 256, 300, 400, 500, 512, 1000, 1024)),
    *(n * MIB for n in (2048, 4096, 5120)),
    *(n * MB for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 200, 250, 500, 1000)),
)


def kind_of(etag: str) -> str:
    """Return what a tag may be: "md5" of the contents, "parts" for the MD5 of the
    parts' MD5s, or empty if it is no digest."""
    if re.fullmatch(r"[0-9a-fA-F]{32}", etag):
        return "md5"
    return "parts" if re.fullmatch(r"[0-9a-fA-F]{32}-[1-9][0-9]{0,4}", etag) else ""


def agrees(file: Path, etag: str) -> bool | None:
    """Return whether a file's contents have the tag; None if the tag is no digest that
    can be computed."""
    size = file.stat().st_size
    if kind_of(etag) == "md5":
        return _md5(file, [size])[0].hex() == etag.lower()
    if kind_of(etag) != "parts":
        return None
    digest, _, count = etag.lower().partition("-")
    candidates = part_sizes(size, int(count))
    for part in candidates:
        lengths = [min(part, size - at) for at in range(0, size, part)]
        whole = hashlib.md5(b"".join(_md5(file, lengths)), usedforsecurity=False)
        if whole.hexdigest() == digest:
            return True
    return False if candidates else None


def part_sizes(size: int, count: int) -> list[int]:
    """Return the usual sizes of parts of which a file of this size has this many, the
    likely first."""
    even = -(-size // count)
    likely = dict.fromkeys((*PARTS, -(-even // MIB) * MIB, even))
    return [part for part in likely if part and -(-size // part) == count]


def _md5(file: Path, lengths: list[int]) -> list[bytes]:
    """Return the MD5 of each of a file's parts, which follow each other."""
    found = []
    with open(file, "rb") as opened:
        for length in lengths:
            digest = hashlib.md5(usedforsecurity=False)
            for block in _blocks(opened, length):
                digest.update(block)
            found.append(digest.digest())
    return found


def _blocks(opened: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0 and (block := opened.read(min(BLOCK, length))):
        length -= len(block)
        yield block


def sha256(file: Path) -> str:
    """Return the sha256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
