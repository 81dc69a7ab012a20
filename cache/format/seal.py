"""Seal a store: keep the digests of its zarr.json files, which nothing else
protects."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

from cache import errors
from cache.errors import damaged, momentary, unreadable
from cache.format.manifest import Images
from cache.format.schema import SEALED, VERSIONS, canonical_digest
from cache.system.durable import replace_file

LARGEST_DOCUMENT, DEEPEST_DOCUMENT = 1 << 26, 50  # bytes and levels of a zarr.json


def read_metadata(path: Path, kept: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Read every zarr.json of a store: its path in the store → the document. kept:
    ``shard_arrays`` without labels. Raises DamagedStore if a document is missing or
    broken; UnreadableStore if it can't be read for the moment."""
    names = (
        "",
        "labels",
        *kept,
        "records",
        "images",
        *(f"images/{field.name}" for field in fields(Images)),
    )
    documents = {}
    for file in (f"{name}/zarr.json".lstrip("/") for name in names):
        try:
            document = read_document(path / file)
        except (OSError, ValueError) as error:
            if momentary(error):
                raise unreadable(path, file, error) from None
            raise damaged(
                path,
                file,
                "it is missing"
                if isinstance(error, FileNotFoundError)
                else f"it can't be read: {error}",
            ) from None
        if not isinstance(document, dict):
            raise damaged(path, file, "it holds no description of an array or group")
        documents[file] = document
    return documents


def read_document(file: Path) -> Any:
    """Read a zarr.json. Raises ValueError if the file is no JSON, no ordinary file, too
    large, or nested deeper than any zarr.json that is written here; OSError if it can't
    be read."""
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_DOCUMENT:
        raise ValueError("it is no ordinary file")
    try:
        document = json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [document]
    for _ in range(DEEPEST_DOCUMENT):
        level = [
            v
            for x in level
            if isinstance(x, (dict, list))
            for v in (x.values() if isinstance(x, dict) else x)
        ]
    if level:
        raise ValueError("it is nested too deep")
    return document


def seals(documents: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the hex sha256 of each zarr.json as a document, without the parts that may
    change: the length of the view axis, the seal itself, and consolidated metadata. A
    user may add consolidated metadata for other tools; it is not read here."""
    digests = {}
    for file, document in documents.items():
        document = {key: value for key, value in document.items() if key != "consolidated_metadata"}
        if file == "zarr.json":
            document["attributes"] = {
                key: value for key, value in document.get("attributes", {}).items() if key != "seal"
            }
        elif (
            "/" in file
            and not file.startswith("images/")
            and isinstance(document.get("shape"), list)
        ):
            document["shape"] = [None, *document["shape"][1:]]
        digests[file] = canonical_digest(document).hex()
    return digests


def write_seal(path: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Write the seal of these documents into the store's own zarr.json, and force the
    file to the disk. Consolidated metadata is left out, since it may be older."""
    whole = documents["zarr.json"]
    whole.pop("consolidated_metadata", None)
    whole["attributes"]["seal"] = seals(documents)
    replace_file(path / "zarr.json", json.dumps(whole, indent=2).encode())


def require_seal(path: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Raise DamagedStore unless these zarr.json files, the store's own among them, are
    what was written."""
    seal = documents["zarr.json"]["attributes"].get("seal")
    for file, digest in seals(documents).items():
        if not isinstance(seal, dict) or seal.get(file) != digest:
            raise errors.damaged(
                path, file, "its digest is another one than in the seal of zarr.json"
            )


def only_its_version_is_wrong(attributes: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Return whether nothing but the version number of a store has changed.

    If the seal is right with one of this program's versions in place of the number, a
    bit of the number has flipped. Any other conclusion would be a guess: a store of a
    newer version may be sealed in another way, and must never be taken for a damaged
    store and "repaired".
    """
    seal = attributes.get("seal")
    mended = (
        {**whole, "attributes": {**attributes, "format_version": v}}
        for v in VERSIONS
        if v >= SEALED
    )
    return isinstance(seal, dict) and any(
        seal.get("zarr.json") == seals({"zarr.json": one})["zarr.json"] for one in mended
    )
