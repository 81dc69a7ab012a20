"""Read images from tar files: WebDataset's shards, a tar file per class, the tar file
of class folders, and a tar file of such tar files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.images.names import is_named_image, split_within
from pipeline.images.patience import DataError, patiently
from pipeline.images.sources.containers import Containers
from pipeline.images.sources.index import Contents, Row
from pipeline.images.sources.tar_headers import Member, Part, TarError, members
from pipeline.images.sources.told_names import class_of, safe_name

TAR = ".tar"
BESIDE = 1 << 20  # bytes of the largest .cls or .json file that is read
# Endings of files beside an image in a sample (WebDataset), in small letters.
ABOUT = ("cls", "json")
# Keys of a sample's .json file that hold the class, and the image's path.
CLASS_KEYS, NAME_KEYS = ("label", "cls", "class"), ("filename", "file_name")


class Tars(Containers):
    """The images of tar files, which are never unpacked.

    Files next to each other whose names are equal up to the first dot are a sample, as
    WebDataset has it, if one of them ends in .cls or .json. The class is what .cls, or
    ``label`` in .json, says; otherwise the folder of the image's name. A tar file among
    several whose images lie in no folder, and whose name is no shard's number, is a
    class.
    """

    kind = "tar file"

    def contents_of(self, file: Path, name: Any) -> Contents:
        return patiently(lambda: self._contents(file, name), name)

    def _contents(self, file: Path, name: Any) -> Contents:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            contents = Contents()
            part = Part(descriptor, 0, os.fstat(descriptor).st_size)
            try:
                _read(part, contents, name.stem if self.by_class else "")
            except TarError as error:
                raise DataError(f"{name} {_repaired(part, error)}") from None
            return contents
        finally:
            os.close(descriptor)

    @cached_property
    def by_class(self) -> bool:
        """Return whether the tar files' names may be those of classes."""
        stems = [name.stem for name in self.files.names]
        return len(stems) > 1 and not all(map(split_within, stems)) and not numbered(stems)


def numbered(stems: Sequence[str]) -> bool:
    """Return whether names are those of shards: they differ by numbers only, which
    stand alone (x-0007, x_1_003), or by one number whose values follow each other.
    ImageNet's n01440764 and n01443537 are none."""
    if len({re.sub(r"\d+", "#", stem) for stem in stems}) > 1:
        return False
    several = [[int(digits) for digits in re.findall(r"\d+", stem)] for stem in stems]
    columns = list(zip(*several, strict=True))
    moving = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if not moving:
        return True
    starts = [found.start() for found in re.finditer(r"\d+", stems[0])]
    if all(starts[i] == 0 or not stems[0][starts[i] - 1].isalpha() for i in moving):
        return True
    values = columns[moving[0]]
    return len(moving) == 1 and max(values) - min(values) + 1 == len(stems)


def _repaired(part: Part, error: TarError) -> str:
    """Complete what is wrong with a tar file by what to do."""
    begin = part.bytes_at(0, 6)
    packed = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}
    if tool := packed.get(begin[:2]):
        return f"is compressed, so nothing in it can be read by its place; unpack it with {tool}"
    if "blocks of zeros" in str(error):
        return (
            f"{error}; get it anew, or, if it is known to be whole, end it with: head -c 1024 "
            f"/dev/zero >> FILE"
        )
    return f"{error}; get it anew, or take it out"


def _read(part: Part, contents: Contents, label: str) -> None:
    """Add the images of a tar file, and of the tar files in it, whose names are then
    classes. label: name of the class of images that lie in no folder, or empty."""
    for sample in _samples(part):
        for one, _ in sample:
            if one.name.endswith(TAR) and not one.fault:
                start = part.start + one.offset
                inner = Part(part.descriptor, start, start + one.size)
                _read(inner, contents, one.name.rpartition("/")[2].removesuffix(TAR))
        _add(part, contents, sample, label)


def _samples(part: Part) -> Iterator[list[tuple[Member, bytes]]]:
    """Yield members that follow each other under one key, each with its bytes if they
    tell something of the image, otherwise with none."""
    sample: list[tuple[Member, bytes]] = []
    last = None
    for member, content in members(part):
        folder, _, file = member.name.rpartition("/")
        key = (folder, file.partition(".")[0])
        if key != last and sample:
            yield sample
            sample = []
        last = key
        sample.append((member, _content(member, content)))
    if sample:
        yield sample


def _content(member: Member, content: Callable[[], bytes]) -> bytes:
    about = _ending(member.name) in ABOUT and not member.fault and member.size <= BESIDE
    return content() if about else b""


def _ending(name: str) -> str:
    """Return all behind the first dot of a file's name, in small letters."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _add(part: Part, contents: Contents, sample: list[tuple[Member, bytes]], label: str) -> None:
    """Add the image of a sample; all images, if nothing beside them makes a sample."""
    images = [one for one, _ in sample if is_named_image(one.name.rpartition("/")[2])]
    about = {_ending(one.name): content for one, content in sample if content}
    told = _told(about)
    if about and images:
        image = next((one for one in images if "." not in _ending(one.name)), images[0])
        contents.beside += len(images) - 1
        images = [image]
    number, text = class_of(next((told[key] for key in CLASS_KEYS if key in told), None))
    for image in images:
        own, why = safe_name(image.name)
        name = own
        for given in (told.get(key) for key in NAME_KEYS):
            if isinstance(given, str) and is_named_image(given.rpartition("/")[2]):
                meant, wrong = safe_name(given)
                name, why = (name, why) if wrong else (meant, "")
        contents.rows.append(
            Row(
                name,
                part.start + image.offset,
                image.size,
                number,
                text or ("" if about or "/" in name else label),
                image.fault or why,
                own,
            )
        )


def _told(about: dict[str, bytes]) -> dict[str, Any]:
    """Return what the files beside an image tell of it. A file that can't be read tells
    nothing."""
    told: Any = None
    with suppress(ValueError, RecursionError):
        told = json.loads(about.get("json", b"{}"))
    told = told if isinstance(told, dict) else {}
    return told | ({"label": about["cls"]} if "cls" in about else {})
