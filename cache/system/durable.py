"""Forcing what was written to the disk: a rename or a new file is on it only when its
folder was synced, its content when the file was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file so that, whatever happens, it has its old content or the new
    one."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        fresh.write_bytes(content)
        sync_file(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """A folder and those above it that are missing, forced to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries (names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write beside ``path``, force it to the disk, then rename it to
    ``path``."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        save(scratch)
        scratch.chmod(0o644)  # safetensors writes for its owner's eyes only
        with open(scratch, "rb") as f:
            os.fsync(f.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill beside ``target``, which takes its place once it is on the disk;
    if anything fails, nothing is left."""
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    try:
        make_folder(scratch)
        yield scratch
        for path in scratch.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner's eyes only
        sync_tree(scratch)
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(target.parent)
