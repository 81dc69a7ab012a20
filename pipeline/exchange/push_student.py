"""Push an exported student to the Hugging Face hub, as a model that timm loads."""

from __future__ import annotations

from pathlib import Path

from pipeline.exchange.hub_upload import Repository


def push(folder: Path, repo: Repository, *, private: bool = False) -> dict[str, str]:
    """Upload an exported folder as a model, in one commit. private: hide the model if
    it is made now. Returns the repository's name, address and commit. Raises
    HubError."""
    repo.create(private)
    operations = [repo.send(path, path.name) for path in sorted(folder.iterdir())]
    commit = repo.commit(operations, "A student of Offline MEAL V2")
    return {"repo": repo.name, "address": repo.address, "commit": commit}


def pushed_lines(pushed: dict[str, str]) -> list[str]:
    """Return the result of ``push`` as lines to print."""
    return [
        f"{pushed['address']}: pushed, commit {pushed['commit'][:12]}",
        f'  timm.create_model("hf-hub:{pushed["repo"]}", pretrained=True) loads it',
    ]
