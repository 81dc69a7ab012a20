"""The seal of a store: the digests of its zarr.json files, which nothing else
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
    """Every zarr.json of a store as a document, by its path in the store; ``kept``:
    ``shard_arrays`` without labels. Raises DamagedStore."""
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
    """A zarr.json. Raises ValueError if it is no JSON, no file, too large, or nested
    deeper than any that is written here; OSError if it can't be read."""
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
    """Hex sha256 of each zarr.json as a document, without what may change: the length
    of the view axis, the seal itself, and consolidated metadata, which a user may add
    for other tools and which is not read here."""
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
    """Put the seal of these documents into the store's own zarr.json, and that file on
    the disk, without consolidated metadata, which may be older."""
    whole = documents["zarr.json"]
    whole.pop("consolidated_metadata", None)
    whole["attributes"]["seal"] = seals(documents)
    replace_file(path / "zarr.json", json.dumps(whole, indent=2).encode())


def require_seal(path: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Raises DamagedStore unless these zarr.json, the store's own among them, are what
    was written."""
    seal = documents["zarr.json"]["attributes"].get("seal")
    for file, digest in seals(documents).items():
        if not isinstance(seal, dict) or seal.get(file) != digest:
            raise errors.damaged(
                path, file, "its digest is another one than in the seal of zarr.json"
            )


def only_its_version_is_wrong(attributes: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Find out that nothing but the version number of a store has changed.

    With one of this program's versions in its place the seal is right, so a bit of the
    number has flipped. Any other reading would be a guess: a store of a newer version
    may be sealed in another way, and must never be taken for a damaged one and
    "repaired".
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
