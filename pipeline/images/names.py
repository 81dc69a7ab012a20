"""Read names of files and folders: as text whatever the locale, left out if a system
made them, and for what they tell of a split or a kind of file."""

from __future__ import annotations

import os
import re
from functools import cache

from PIL import Image

# Folders that Linux, macOS, Windows, NAS systems and Python leave among a user's files.
SYSTEM_FOLDERS = frozenset(
    (
        "__macosx",
        "__pycache__",
        "lost+found",
        "$recycle.bin",
        "system volume information",
        "found.000",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@sharebin",
        "@tmp",
        "@__thumb",
        "~snapshot",
        "recycler",
        "network trash folder",
        "temporary items",
        "#recycle",
        "#snapshot",
    )
)
SYSTEM_FILES = frozenset(
    ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", ".ds_store")
)
# Names of splits, in small letters without separators, by the split that they mean.
SPLIT_NAMES = {
    "train": ("train", "training", "trainset", "trainimages", "traindata", "trn"),
    "val": ("val", "valid", "validation", "valset", "valimages", "valdata", "dev", "eval"),
    "test": ("test", "testing", "testset", "testimages", "testdata", "tst", "holdout"),
}
# Names of folders that hold a kind of file, in small letters and without the last s.
BESIDE_NAMES = frozenset(  # of what lies beside images
    (
        *("annotation", "attribute", "bbox", "box", "devkit", "imageset", "json", "label"),
        *("mask", "meta", "metadata", "part", "segmentation", "trimap", "xml"),
    )
)
IMAGE_NAMES = frozenset(
    ("frame", "image", "img", "jpegimage", "jpg", "jpeg", "photo", "picture", "png")
)
TEXT_NAMES = frozenset(  # of files without a suffix that are no images
    (
        *("authors", "changelog", "citation", "copying", "installation"),
        *("license", "licence", "makefile", "notice", "readme"),
    )
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, and so never looked at."""
    return name.startswith(".")


def is_system_folder(name: str) -> bool:
    """Return whether a folder is one that a system left, and no class."""
    return name.casefold() in SYSTEM_FOLDERS


def is_system_path(path: str) -> bool:
    """Return whether a relative path leads to a file that a system left, or into a
    folder that a system left."""
    *parents, name = path.split("/")
    return (
        name.casefold() in SYSTEM_FILES
        or name.endswith(":Zone.Identifier")  # Windows's mark on a file from the internet
        or any(is_system_folder(part) for part in parents)
    )


def may_be_image(name: str) -> bool:
    """Return whether a file's name may be an image's: it has the suffix of an image,
    or no suffix that anybody knows."""
    if name.casefold() in TEXT_NAMES:
        return False
    suffix = os.path.splitext(name)[1].lower()
    return not is_hidden(name) and (
        suffix in _image_suffixes() or not suffix[1:].isalnum() or suffix[1:].isdecimal()
    )


def is_named_image(name: str) -> bool:
    """Return whether a file's name has the suffix of an image."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in _image_suffixes()


@cache
def _image_suffixes() -> frozenset[str]:
    more = (".heic", ".heif", ".avif", ".jxl", ".webp", ".raw", ".dng", ".cr2", ".nef")
    return frozenset((*Image.registered_extensions(), *more)) - {".pdf", ".h5", ".hdf"}


def split_of(name: str) -> str | None:
    """Return the split that a folder's name means: "train", "val" or "test"; None for
    the name of no split."""
    plain = "".join(c for c in name.casefold() if c.isalpha())
    return next((split for split, names in SPLIT_NAMES.items() if plain in names), None)


def split_within(name: str) -> str | None:
    """Return the split that a folder's name, or one word of the name, means: "train"
    for cars_train. This is a guess: bullet_train is a class."""
    return next((split for one in (name, *_words(name)) if (split := split_of(one))), None)


def is_beside(name: str) -> bool:
    """Return whether a folder's name is that of what lies beside images, like masks."""
    return name.casefold().removesuffix("s") in BESIDE_NAMES


def tells_no_class(name: str) -> bool:
    """Return whether each word of a folder's name means a split or a kind of file:
    train, images, train_masks."""
    return bool(split_of(name)) or all(
        split_of(word) or word.casefold().removesuffix("s") in BESIDE_NAMES | IMAGE_NAMES
        for word in _words(name) or [name]
    )


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W\d_]+", name) if word]


def as_text(name: str) -> str:
    """Return a name of the operating system as the manifest has it.

    The name's bytes are read as UTF-8 in every locale. Bytes that aren't UTF-8 become
    lone surrogates, as Python has them under a UTF-8 locale.
    """
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "surrogateescape")


def on_disk(name: str) -> str:
    """Return a name, or a path, as Python hands it to the operating system under the
    current locale. Reverses ``as_text``."""
    return name if name.isascii() else os.fsdecode(name.encode("utf-8", "surrogateescape"))


def is_utf8(name: str) -> bool:
    """Return whether a name, as ``as_text`` gives it, is UTF-8 on the disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def natural(name: str) -> str:
    """Return a key that sorts names by the numbers in them: 2 before 10."""
    return re.sub(r"[0-9]+", lambda number: number[0].zfill(255), name)
