"""Read addresses of label stores on the hub: hf://ORG/NAME, or with a branch, a tag or
a commit hf://ORG/NAME@REVISION."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from os import PathLike

from cache.errors import StoreError

# "hf://", or "hf:/" as pathlib leaves it; datasets/ is how others write such addresses
HUB = re.compile(r"hf:/+(?:datasets/)?", re.IGNORECASE)
# What the hub takes for a name: letters, digits, "-", "_", ".", no "--" or "..", at
# most 96 characters in all.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[.-](?![.-]))*(?<![.-])"
REPO = re.compile(f"{_PART}/{_PART}")
LONGEST_REPO = 96
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
COMMIT = re.compile("[0-9a-f]{40}")


class HubError(StoreError):
    """An error about a repository of the hub: its address, access to it, its
    content."""


def is_hub(path: object) -> bool:
    """Return whether this names a place on the hub."""
    return isinstance(path, str | PathLike) and HUB.match(str(os.fspath(path))) is not None


def require_repo(text: str) -> str:
    """Return the name of a repository, ORG/NAME. Raises HubError for any other
    text."""
    name = HUB.sub("", text, count=1) if is_hub(text) else text
    if len(name) > LONGEST_REPO or not REPO.fullmatch(name) or name.endswith(".git"):
        raise HubError(
            f"{text} is no name of a repository on the hub; write ORG/NAME with letters, digits, "
            f"-, _ and ., at most {LONGEST_REPO} of them"
        )
    return name


@dataclass(frozen=True)
class Address:
    """A label store on the hub. revision: a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    @classmethod
    def parse(cls, path: str | PathLike[str]) -> Address:
        """Read hf://ORG/NAME or hf://ORG/NAME@REVISION. Raises HubError."""
        text = str(os.fspath(path))
        repo, at, revision = HUB.sub("", text, count=1).rstrip("/").partition("@")
        good = REVISION.fullmatch(revision) and ".." not in revision
        if at and not good:
            raise HubError(
                f"{text} names no revision after its @; write hf://ORG/NAME@REVISION with a "
                f"branch, a tag or a commit, or leave out the @"
            )
        return cls(require_repo(repo), revision or "main")

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")
