"""Read a class map, and match a data set's classes with the classes that others
know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.images.data_set import DataSet, plural
from pipeline.images.patience import DataError
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted, same, some, told_apart


def read_class_map(path: str | Path) -> list[str]:
    """Read a class map: a text file with the name of one class folder a line.

    A name's place, from 0, is its class index. Empty lines and blanks at the ends of a
    line don't count. Raises DataError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--class-map {path} can't be read ({error}); it must be imagenet-1k or a text file "
            f"with one folder name a line"
        ) from None
    names = [line.strip() for line in text.split("\n") if line.strip()]
    seen: dict[str, str] = {}
    for name in names:
        if other := seen.get(same(name)):
            raise DataError(
                f"--class-map {path} must hold every class folder's name once, one a line; it "
                f"has {' and '.join(told_apart(other, name))}"
            )
        seen[same(name)] = name
    if not names:
        raise DataError(
            f"--class-map {path} is empty; it must hold every class folder's name once, one a line"
        )
    return names


def map_classes(data: DataSet, names: Sequence[str] | None, owner: str, outputs: int) -> DataSet:
    """Map class folders by name to the classes that a model knows.

    names: the model's classes in the order of its outputs; None if they aren't known. A
    data set that tells classes by number, or none, then gets numbers for names.
    outputs: number of the model's outputs. owner: what knows the names, for messages.
    The folders may be some of the classes, in any order. A class map of the user's
    stays: it may give classes other names, but none of the model's names another place.
    Raises DataError for class folders that have no name there.
    """
    if names is None:
        return _named_by_number(data, outputs)
    if [same(n) for n in names] == [same(n) for n in data.class_names]:
        return replace(data, mapped=True)
    place = {same(name): i for i, name in enumerate(names)}
    if data.mapped:
        _require_no_contradiction(data, place, owner)
        return data
    told = data.source.classes(names)
    if told.numbered or not told.names:
        return _numbered(data, names, owner, len(told.names))
    folders, noun = told.names, data.source.noun
    if foreign := [name for name in folders if same(name) not in place]:
        data.source.require_images(foreign, data.split)
        raise DataError(
            f"{data.path} has {counted(len(foreign), noun, plural(noun))} ({some(foreign)}) of no "
            f"class of {owner}, whose {len(names)} classes are {some(names)}; pass images of these "
            f"classes, or as --class-map a file that lists them in this order under the folders' "
            f"names"
        )
    say(
        f"{data.path} has {'folders of ' * (noun != 'class')}{len(folders)} of the {len(names)} "
        f"classes of {owner}"
        if len(names) > len(folders)
        else f"the classes of {data.path} have the order of {owner}, not that of their names"
    )
    return replace(data, class_names=list(names), mapped=True)


def _numbered(data: DataSet, names: Sequence[str], owner: str, told: int) -> DataSet:
    """Give a data set that tells classes by number, or none, the names that others
    know."""
    if told > len(names):
        raise DataError(
            f"{data.path} has class numbers up to {told - 1}, and {owner} has {len(names)} "
            f"classes; pass images of these classes"
        )
    if told:
        say(f"the class numbers of {data.path} are places among the classes of {owner}")
    return data.named(names)


def _named_by_number(data: DataSet, outputs: int) -> DataSet:
    """Give a data set that tells classes by number, or none, numbers for names."""
    told = data.told()
    if data.mapped or not (told.numbered or not told.names) or len(told.names) > outputs:
        return data
    return data.named([str(i) for i in range(outputs)], mapped=False)


def _require_no_contradiction(data: DataSet, place: dict[str, int], owner: str) -> None:
    for i, name in enumerate(data.class_names):
        if place.get(same(name), i) != i:
            raise DataError(
                f"the class map says that class {i} is {name}, which is class {place[same(name)]} "
                f"of {owner}; pass the class map of these classes, or leave it out: class folders "
                f"are then found by name"
            )
