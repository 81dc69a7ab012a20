"""Refuse URLs where a path is wanted."""

from __future__ import annotations

import re
from os import PathLike, fspath

from cache.errors import StoreError

# A scheme of two letters or more, then "://", or ":/" as pathlib leaves it. The places
# of remote copies, "host:/folder", look the same.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


class NotLocal(StoreError):
    """A URL where only a path is understood. fault: the message without the URL at its
    start."""

    def __init__(self, text: str, fault: str) -> None:
        super().__init__(f"{text} {fault}")
        self.fault = fault


def require_local(*paths: object, images: bool = False) -> None:
    """Raise NotLocal if one of the paths is a URL, such as s3://bucket/x or
    file:///x. Taken as a path, a URL would name a local folder ``s3:``. None is
    passed over, and so is what is no path: the parsed URL of images. images: whether
    the paths name images, which nothing reads from the hub."""
    for path in paths:
        if not isinstance(path, str | PathLike):
            continue
        text = fspath(path)
        if found := URL.match(text if isinstance(text, str) else ""):
            if found[1].lower() == "hf" and not images:
                raise NotLocal(
                    text,
                    "is on the hub, where label stores are only read; name a local path here, and "
                    "upload a store with: share STORE --to ORG/NAME",
                )
            repair = (
                f"write {'/' + text[found.end() :].lstrip('/')} instead"
                if found[1].lower() == "file"
                else "copy it to a local disk, or mount it there, and name the path"
            )
            raise NotLocal(text, f"is a URL, and only local paths are read and written; {repair}")
