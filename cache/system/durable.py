"""Force files and folders to the disk.

A rename or a new file is on the disk only once its folder was synced. A file's content
is on the disk only once the file was synced. Some file systems (of FUSE, SMB) can't be
told to: their errors of ``UNABLE`` pass, since nothing more can be had from them.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# errors of fsync that say that the file system knows no such call
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file so that, whatever happens, the file has its old content or the
    new content."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        fresh.write_bytes(content)
        sync_file(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and the missing folders above it, and force them to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with open(path, "rb") as f:
        _sync(f.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries (names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNABLE:
            raise


def sync_tree(root: Path) -> None:
    """Force a folder and everything below it to the disk."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a file beside ``path``, force the file to the disk, then
    rename it to ``path``."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        mode = _usual_mode(path.parent)
        save(scratch)
        _set_mode(scratch, mode)
        sync_file(scratch)
        os.replace(scratch, path)
    except OSError as error:
        if error.filename is None:  # a failed write doesn't say of which file
            error.filename = os.fspath(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target`` to fill. The folder is forced to the disk, then
    renamed to ``target``. If anything fails, nothing is left."""
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
    try:
        make_folder(scratch)
        mode = _usual_mode(scratch)
        yield scratch
        for path in scratch.iterdir():
            _set_mode(path, mode)
        sync_tree(scratch)
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(target.parent)


def _usual_mode(folder: Path) -> int:
    """Return the permissions that a new file gets in a folder. The umask decides, and
    perhaps the folder's own list of permissions."""
    probe = folder / f".{uuid.uuid4().hex}.partial"
    try:
        probe.touch()
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def _set_mode(path: Path, mode: int) -> None:
    """Give a file the permissions of other new files, since safetensors lets only the
    owner read its files. Some file systems have no permissions to set."""
    if path.is_file() and path.stat().st_mode & 0o777 != mode:
        with suppress(OSError):
            path.chmod(mode)
