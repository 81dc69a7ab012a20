"""Push an exported student to the Hugging Face hub, as a model that timm loads."""

from __future__ import annotations

import json
from pathlib import Path

from cache.hub import client
from cache.hub.address import HubError
from pipeline.exchange.hub_upload import Repository
from pipeline.models.model import METADATA

CONFIG = "config.json"


def push(folder: Path, repo: Repository, *, private: bool = False) -> dict[str, str]:
    """Upload an exported folder as a model, in one commit. private: hide the model if
    it is made now. Returns the repository's name, address and commit. Raises
    HubError, also for a repository that holds anything but such a student."""
    repo.create(private)
    _require_ours(repo)
    operations = [repo.send(path, path.name) for path in sorted(folder.iterdir())]
    commit = repo.commit(operations, "A student of Offline MEAL V2")
    return {"repo": repo.name, "address": repo.address, "commit": commit}


def _require_ours(repo: Repository) -> None:
    """Raise HubError if the repository holds files that another program has put
    there."""
    there = set(repo.files()) - {"README.md", ".gitattributes"}
    if there and not (CONFIG in there and _is_ours(repo)):
        raise HubError(
            f"{repo.name} holds files of another program ({min(there)}), which a push would write "
            f"over; choose another name, or empty that repository"
        )


def _is_ours(repo: Repository) -> bool:
    """Return whether config.json was written by ``save_for_timm``."""
    try:
        return METADATA in json.loads(client.read(repo.name, repo.head(), CONFIG, "model"))
    except (ValueError, TypeError):  # no JSON, or no object
        return False


def pushed_lines(pushed: dict[str, str]) -> list[str]:
    """Return the result of ``push`` as lines to print."""
    return [
        f"{pushed['address']}: pushed, commit {pushed['commit'][:12]}",
        f'  timm.create_model("hf-hub:{pushed["repo"]}", pretrained=True) loads it',
    ]
