"""Pack the files of a label store for the hub, and unpack them.

A store of ImageNet has tens of thousands of files, more than a repository of the hub
should have. So the hub holds packs: plain tar files whose bytes depend on their content
alone. A pack of the description holds every zarr.json, the manifest and the completion
records. The other packs hold the files of some shards of one view each. An index,
packs.json, says which file holds what, with sizes and digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.hub.address import HubError
from cache.system.durable import make_folder, sync_file, sync_folder

INDEX, FORMAT, VERSION = "packs.json", "meal-v2-shared-store", 1
PACK_BYTES = 500_000_000  # of a pack at most, unless one shard alone is larger
MOST_SHARDS = 100_000  # of a pack, more than any view has
NAME = re.compile(r"(?:packs/view-[0-9]{4,9}-[0-9]{3,9}|description)-[0-9a-f]{16}\.tar")
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Pack:
    """A pack, as the index tells it. view, first, stop: the shards that it holds; none
    for the description's."""

    file: str
    size: int
    sha256: str
    view: int = 0
    first: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Index:
    """The index of a shared store. identity: of the store. licence: chosen by the
    owner, or None."""

    identity: str
    description: Pack
    packs: tuple[Pack, ...]
    licence: str | None = None

    def encode(self) -> bytes:
        """Return the index as a file."""
        head = {"format": FORMAT, "format_version": VERSION, **asdict(self)}
        return (json.dumps(head, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes, where: str) -> Index:
        """Read an index. where: its address, for messages. Raises HubError if it is no
        index, names files that no pack may have, or has a newer version."""
        try:
            document = json.loads(content)
            if document["format"] != FORMAT:
                raise KeyError("format")
            if (version := document["format_version"]) != VERSION:
                raise HubError(
                    f"{where} has version {version} of shared stores, this program reads "
                    f"{VERSION}; update this program"
                )
            packs = tuple(_pack(one, where) for one in document["packs"])
            licence = document.get("licence")
            return cls(
                str(document["identity"]),
                _pack(document["description"], where),
                packs,
                None if licence is None else str(licence),
            )
        except (ValueError, KeyError, TypeError, RecursionError, UnicodeDecodeError):
            raise HubError(
                f"{where} holds no label store that this program can read ({INDEX} is no index); "
                f"check the address"
            ) from None


def _pack(document: dict[str, Any], where: str) -> Pack:
    pack = Pack(**document)
    numbers = (pack.size, pack.view, pack.first, pack.stop)
    if not NAME.fullmatch(pack.file) or not DIGEST.fullmatch(pack.sha256):
        raise HubError(
            f"{where} names a file that no pack can have ({pack.file!r}); don't use this store"
        )
    if any(type(number) is not int or not 0 <= number < 1 << 48 for number in numbers) or (
        pack.stop - pack.first > MOST_SHARDS
    ):
        raise ValueError("a number that can't be")
    return pack


def groups(sizes: list[int], most: int | None = None) -> list[tuple[int, int]]:
    """Divide the shards of a view among packs of about equal size: [(first, stop)].
    sizes: bytes of each shard. most: bytes of a pack; None: PACK_BYTES."""
    most = PACK_BYTES if most is None else most
    fair = sum(sizes) / max(1, -(-sum(sizes) // most))
    found, first, taken = [], 0, 0
    for shard, size in enumerate(sizes):
        if shard > first and (taken + size > most or taken >= fair):
            found.append((first, shard))
            first, taken = shard, 0
        taken += size
    return [*found, (first, len(sizes))]


def name_of(kind: str, digest: bytes) -> str:
    """Return the name of a pack. digest: of what the pack holds."""
    return f"{kind}-{digest.hex()[:16]}.tar"


def write(target: Path, files: Iterable[tuple[str, Path]]) -> tuple[int, str]:
    """Write a pack of files, each with its name in the pack. Equal files make equal
    bytes. Returns (size, hex sha256)."""
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, path in files:
            with open(path, "rb") as file:
                about = tarfile.TarInfo(name)
                about.size, about.mode = os.fstat(file.fileno()).st_size, 0o644
                tar.addfile(about, file)
    with open(target, "rb") as file:
        return target.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def unpack(
    pack: Path, into: Path, allowed: Callable[[str], bool], *, where: str, sync: bool = True
) -> None:
    """Put the files of a pack into a folder. A file takes its name when it is whole and
    on the disk. where: the pack's address, for messages. Raises HubError for a file
    that isn't ``allowed``, and for what is no pack."""
    folders = set()
    try:
        with tarfile.open(pack, "r:") as tar:
            for member in tar:
                # A sparse file may be far larger than its pack.
                whole = member.isreg() and not member.issparse()
                if not whole or not allowed(member.name):
                    raise HubError(
                        f"{where} holds {member.name!r}, which is no file of this pack; don't use "
                        f"this store"
                    )
                target = into / member.name
                make_folder(target.parent)
                fresh = target.with_name(f".{target.name}.partial")
                source = tar.extractfile(member)
                assert source is not None
                with open(fresh, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                if sync:
                    sync_file(fresh)
                os.replace(fresh, target)
                folders.add(target.parent)
    except (tarfile.TarError, EOFError):
        raise HubError(f"{where} is no tar file; tell its owner") from None
    for folder in folders if sync else ():
        sync_folder(folder)
