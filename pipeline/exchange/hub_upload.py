"""Upload files to a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.hub import client
from cache.hub.address import HubError, require_repo
from pipeline.runtime.progress import say


class Repository:
    """A repository of the hub that this user writes to. kind: model or dataset."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = require_repo(name), kind
        self.about = f"{self.name} on the hub"

    def require_token(self) -> None:
        """Raise HubError unless there is a token, the hub knows it, and it may write
        something."""
        if client.offline():
            raise HubError(
                f"{self.name} can't be written to, since HF_HUB_OFFLINE forbids it; unset it"
            )
        client.tell = say
        known = client.persistently(lambda: client.api().whoami(), self.about)
        role = known.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubError(
                f"{self.about}: this token of {known.get('name')} may only read; make one that "
                f"may write, and {client.LOG_IN}"
            )

    def create(self, private: bool) -> None:
        """Create the repository, unless it is there, and make sure that this user may
        write to it. private: hide a new one."""
        client.library().utils.disable_progress_bars()
        client.library().logging.set_verbosity_error()
        client.persistently(
            lambda: client.api().create_repo(
                self.name, repo_type=self.kind, private=private or None, exist_ok=True
            ),
            self.about,
        )
        self.send(b"a question, which is not committed", "README.md")

    def files(self) -> dict[str, tuple[int, str]]:
        """List the files: size and, of large ones, sha256, by path."""

        def ask() -> dict[str, tuple[int, str]]:
            tree = client.api().list_repo_tree(self.name, repo_type=self.kind, recursive=True)
            return {
                one.path: (one.size, one.lfs.sha256 if one.lfs else "")
                for one in tree
                if hasattr(one, "blob_id")
            }

        return client.persistently(ask, self.about)

    def head(self) -> str:
        """Return the newest commit."""
        return str(
            client.persistently(
                lambda: client.api().repo_info(self.name, repo_type=self.kind).sha, self.about
            )
        )

    def send(self, file: Path | bytes, name: str) -> Any:
        """Send the content of a file ahead of its commit, for which an operation is
        returned. Whether the file is still needed, ``still_needed`` says."""
        operation = client.library().CommitOperationAdd(
            name, file if isinstance(file, bytes) else str(file)
        )
        client.persistently(
            lambda: client.api().preupload_lfs_files(
                self.name, [operation], repo_type=self.kind, free_memory=True
            ),
            f"{name} of {self.about}",
        )
        return operation

    def commit(self, operations: Sequence[Any], message: str, gone: Sequence[str] = ()) -> str:
        """Commit files that were sent, and take others away. Returns the commit."""
        delete = client.library().CommitOperationDelete

        def once() -> Any:
            # A try before this one may have been made, and only its answer lost.
            there = self.files() if gone else {}
            away = [delete(name) for name in gone if name in there]
            return client.api().create_commit(
                self.name, [*operations, *away], commit_message=message, repo_type=self.kind
            )

        return str(client.persistently(once, self.about).oid)

    @property
    def address(self) -> str:
        """Return the address of the repository's page."""
        return f"{client.endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def still_needed(operation: Any) -> bool:
    """Return whether the file of an operation is read once more when it is
    committed."""
    return operation.path_or_fileobj != b""
