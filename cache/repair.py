"""Repair a store's own description: its zarr.json files and its manifest. The files
come from an empty store that is created in the same way."""

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
    """Return the folder in which a description is rebuilt. Only the holder of the claim
    "create" touches the folder."""
    return path.with_name(f".{path.name}.mending")


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Give the path for the empty store that lends its files. The folder is removed at
    the end. A folder that a killed process left is removed at the start."""
    shutil.rmtree(folder_of(path), ignore_errors=True)
    try:
        yield folder_of(path) / path.name
    finally:
        shutil.rmtree(folder_of(path), ignore_errors=True)


def described(attributes: dict[str, Any]) -> dict[str, Any]:
    """Select the attributes of a store that are needed to create an empty store of the
    same description."""
    return {
        key: attributes[key]
        for key in ("codec", "class_names", "provenance", "fingerprint", "made_with")
        if key in attributes
    }


def opened(
    path: Path, make: Callable[[Path, int], object], say: Callable[[str], None]
) -> StoreWriter:
    """Open the store at ``path`` for writing. A missing store is created, and a damaged
    description is rebuilt.

    make: creates an empty store of the same description at a given path, with at least
    the given number of views. Raises BusyStore if another process is repairing the
    store.
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
    """Rebuild the description of a damaged store with the files of an empty store.

    make: creates an empty store at a given path, with the given attributes (None:
    attributes of its own) and at least the given number of views. The attributes of the
    damaged store are tried first, if they are or may be what was written. Raises
    StoreError if the labels don't belong to the new description.
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
    """Return (the attributes of a damaged store, whether they are certainly what was
    written). Attributes that are certainly wrong are None. Attributes without a seal
    may be right or wrong."""
    whole = _document(path / "zarr.json")
    if not whole:
        return None, False
    attributes = whole.get("attributes", {})
    if validate.broken_attribute(attributes) or ("seal" in attributes and not _sealed(whole)):
        return None, False
    return attributes, "seal" in attributes  # without a seal: older than the seal


def views_of(path: Path) -> int:
    """Return the number of views that a damaged store has records of, or the number
    that its attributes state, if it is larger and the attributes are certainly what was
    written."""
    attributes, surely = attributes_of(path)
    said = attributes.get("views", 1) if attributes and surely else 1
    with suppress(OSError):
        return max(
            said,
            *(int(name) + 1 for name in os.listdir(path / "records" / "c") if name.isdecimal()),
        )
    return said


def mend(path: Path, fresh: Path) -> list[str]:
    """Replace the files in the description of ``path`` that differ from those of
    ``fresh``, and return the paths of the replaced files.

    fresh: an empty store made from the same images, teachers and recipe, with at least
    ``views_of(path)`` views. Raises StoreError, and changes nothing, if the labels in
    ``path`` don't belong to the recipe of ``fresh``. The digests of shards decide.
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
    """Raise StoreError if the labels in ``path`` don't belong to the description of
    ``made``, the new, empty store.

    Shards are copied one by one from ``path`` into ``made``, until one agrees with the
    digest in its completion record. StoreError is raised if there are shards, and none
    of them agrees.
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
    """Copy the files of a shard of ``path`` into the store ``made``, and remove them
    from there at the end."""
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
    """Return whether a store's own zarr.json is the one that was sealed."""
    seal = whole.get("attributes", {}).get("seal")
    return (
        isinstance(seal, dict) and seal.get("zarr.json") == seals({"zarr.json": whole})["zarr.json"]
    )


def _views(document: dict[str, Any]) -> int:
    return next(iter(document.get("shape") or [0]))
