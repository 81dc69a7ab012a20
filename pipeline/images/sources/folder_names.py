"""List the folders in a folder that are classes, and those that aren't."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pipeline.images.names import as_text, is_hidden, is_system_folder
from pipeline.images.patience import DataError, is_folder, listed, status
from pipeline.runtime.wording import same, told_apart


def _folder_names(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, except hidden folders."""
    return sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if not is_hidden(entry.name) and is_folder(entry)
    )


def class_folders(folder: Path, known: Collection[str] = ()) -> list[str]:
    """Return the names of the class folders, sorted. Folders that a system left are
    none, unless they are ``known`` as classes. Raises DataError, also for two folders
    whose names look the same."""
    named = {same(name) for name in known}
    names = [
        name for name in _folder_names(folder) if not is_system_folder(name) or same(name) in named
    ]
    if not names:
        raise DataError(
            f"{folder} has no class folders; it must hold one folder per class, with the images in "
            f"them"
        )
    first: dict[str, str] = {}
    for name in names:
        if other := first.get(same(name)):
            raise DataError(
                f"{folder} has two folders of one class, whose names differ in Unicode "
                f"normalisation only ({' and '.join(told_apart(other, name))}); make them one"
            )
        first[same(name)] = name
    return names


def left_out(folder: Path) -> list[str]:
    """Return the names of the folders beside the class folders that are no classes:
    hidden ones, and those that a system left."""
    return sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if (is_hidden(entry.name) or is_system_folder(entry.name)) and is_folder(entry)
    )


def broken_links(folder: Path) -> list[str]:
    """Return the names of the links beside the class folders that lead nowhere."""
    return sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if entry.is_symlink() and not is_hidden(entry.name) and status(entry.path) is None
    )
