"""Putting a store's own description right: zarr.json files and the manifest, from an
empty store that was made anew in the same way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache import errors
from cache.errors import BusyStore, DamagedStore, StoreError
from cache.format import validate
from cache.format.seal import read_document, read_metadata, seals, write_seal
from cache.reader import LabelStore
from cache.system import durable
from cache.system.claims import claim, claims_of
from cache.writer import StoreWriter


def folder_of(path: Path) -> Path:
    """The folder in which a description is made anew. Only the holder of the claim
    "create" touches it."""
    return path.with_name(f".{path.name}.mending")


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Where to make the empty store that lends its files; removed at the end, and what
    a killed process left there at the start."""
    shutil.rmtree(folder_of(path), ignore_errors=True)
    try:
        yield folder_of(path) / path.name
    finally:
        shutil.rmtree(folder_of(path), ignore_errors=True)


def described(attributes: dict[str, Any]) -> dict[str, Any]:
    """What an empty store is made with, of a store's attributes."""
    return {
        key: attributes[key]
        for key in ("codec", "class_names", "provenance", "fingerprint", "made_with")
        if key in attributes
    }


def opened(
    path: Path, make: Callable[[Path, int], object], say: Callable[[str], None]
) -> StoreWriter:
    """Open the store at ``path``, made if there is none, its description made anew if
    that is damaged.

    make: creates an empty store of the same description at another path, with so many
    views at least.
    """
    if not path.exists():
        make(path, 0)
    try:
        writer = StoreWriter(path)
        _ = writer.store.images
    except DamagedStore as damage:
        say(str(damage))
        with claim(claims_of(path), "create", "grow") as mine:
            if len(mine) < 2:
                raise BusyStore(
                    f"{path} is being mended by another process right now; run this command again "
                    f"in a minute"
                ) from None
            remake(path, lambda fresh, kept, views: make(fresh, views), say)
        writer = StoreWriter(path)
    return writer


def remake(
    path: Path,
    make: Callable[[Path, dict[str, Any] | None, int], object],
    say: Callable[[str], None],
) -> None:
    """Make the description of a damaged store anew: an empty store lends its files.

    make: creates an empty store at another path, of these attributes if some are given,
    with so many views at least. The attributes of the damaged store are tried first, if
    they are whole or may be. Raises StoreError if the labels are not of the new
    description.
    """
    kept, surely = attributes_of(path)
    with scratch(path) as fresh:
        for attributes in (kept,) if surely else (kept, None) if kept else (None,):
            try:
                make(fresh, attributes, views_of(path))
                for file in mend(path, fresh):
                    say(f"made {file} of {path} anew")
                break
            except StoreError:
                if attributes is None or surely:
                    raise
                shutil.rmtree(fresh, ignore_errors=True)


def attributes_of(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """(the attributes of a damaged store, if they are what was written, or may be;
    whether they surely are)."""
    whole = _document(path / "zarr.json")
    if not whole:
        return None, False
    attributes = whole.get("attributes", {})
    if validate.broken_attribute(attributes) or ("seal" in attributes and not _sealed(whole)):
        return None, False
    return attributes, "seal" in attributes  # none: older than the seal


def views_of(path: Path) -> int:
    """Number of views that a damaged store has records of, or says that it has where
    its attributes are what was written."""
    attributes, surely = attributes_of(path)
    said = attributes.get("views", 1) if attributes and surely else 1
    with suppress(OSError):
        return max(
            said,
            *(int(name) + 1 for name in os.listdir(path / "records" / "c") if name.isdecimal()),
        )
    return said


def mend(path: Path, fresh: Path) -> list[str]:
    """Replace what differs in the description of ``path`` from that of ``fresh``, an
    empty store made from the same images, teachers and recipe, with at least
    ``views_of(path)`` views. Returns the replaced files.

    Raises StoreError, and changes nothing, if the labels in ``path`` are not of the
    recipe of ``fresh``: it is tried on a shard.
    """
    made = LabelStore.open(fresh)
    whole = _document(path / "zarr.json")
    sound = whole is not None and _sealed(whole)
    _require_same_labels(path, made)
    kept = made.shard_arrays[1:]
    wanted = read_metadata(fresh, kept)
    replaced = []
    for file, digest in seals(wanted).items():
        if file == "zarr.json" and sound:
            continue
        now = _document(path / file)
        if not now or seals({file: now})[file] != digest or _views(now) < _views(wanted[file]):
            durable.make_folder((path / file).parent)
            durable.replace_file(path / file, json.dumps(wanted[file], indent=2).encode())
            replaced.append(file)
    for column in sorted((fresh / "images").glob("*/c/**/*")):
        file = column.relative_to(fresh).as_posix()
        if column.is_file() and (
            not (path / file).exists() or (path / file).read_bytes() != column.read_bytes()
        ):
            durable.make_folder((path / file).parent)
            durable.replace_file(path / file, column.read_bytes())
            replaced.append(file)
    write_seal(path, read_metadata(path, kept))
    return replaced


def _require_same_labels(path: Path, made: LabelStore) -> None:
    """Refuse a description of other labels. ``made``: the new, empty store.

    Copies one shard after the other from ``path`` into ``made``, until one has the
    digest in its completion record. Raises StoreError if shards are there and none of
    them has.
    """
    wrong = 0
    for record in sorted(path.glob("records/c/*/*/0")):
        view, shard = (int(part) if part.isdecimal() else -1 for part in record.parts[-3:-1])
        if 0 <= view < made.views and 0 <= shard < made.shards:
            with _copied(path, made, view, shard):
                if made.is_finished(view, shard):
                    if not made.fault(view, shard):
                        return
                    wrong += 1
    if wrong:
        raise StoreError(
            f"the labels in {path} were made from other images, teachers or another recipe than "
            "this command's, and the store is damaged; run the command that made it, or restore "
            "it from a copy"
        )


@contextmanager
def _copied(path: Path, made: LabelStore, view: int, shard: int) -> Iterator[None]:
    """Have the files of a shard of ``path`` in the store ``made`` too."""
    files = [made.file(name, view, shard) for name in (*made.shard_arrays, "records")]
    try:
        for file in files:
            there = path / file.relative_to(made.path)
            if there.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(there, file)
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _document(file: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError, ValueError):
        try:
            document = read_document(file)
        except OSError as error:
            if errors.momentary(error):
                raise errors.unreadable(file.parent, file.name, error) from None
            return None
        if isinstance(document, dict) and isinstance(document.get("attributes", {}), dict):
            return document
    return None


def _sealed(whole: dict[str, Any]) -> bool:
    """Whether a store's own zarr.json is what was sealed."""
    seal = whole.get("attributes", {}).get("seal")
    return (
        isinstance(seal, dict) and seal.get("zarr.json") == seals({"zarr.json": whole})["zarr.json"]
    )


def _views(document: dict[str, Any]) -> int:
    return next(iter(document.get("shape") or [0]))
