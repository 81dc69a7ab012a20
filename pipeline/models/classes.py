"""Compare the class names that models and data know, and put the rows of a model's head
in the order of a data set's classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.models.model import Model, ModelError
from pipeline.runtime.wording import same, some


def same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists name the same classes in the same order. Names that
    differ in their Unicode normalisation only are the same."""
    return _plain(some) == _plain(others)


def known_classes(models: Sequence[Model]) -> tuple[str, ...] | None:
    """Return the class names that models agree on, in the order of their outputs; None
    if no model knows its classes.

    Raises ModelError if two models know different names, or the same names in another
    order.
    """
    knowing = [(i, model) for i, model in enumerate(models, 1) if model.class_names is not None]
    if not knowing:
        return None
    at, first = knowing[0]
    names = first.class_names or ()
    for place, other in knowing[1:]:
        if not same_names(names, other.class_names or ()):
            one, another = (
                (first.name, other.name)
                if first.name != other.name
                else (f"{first.name} (number {at})", f"{other.name} (number {place})")
            )
            raise ModelError(
                f"{one} and {another} know other classes: "
                f"{difference(one, names, another, other.class_names or ())}; "
                f"take models of the same classes in the same order"
            )
    return names


def difference(one: str, names: Sequence[str], another: str, others: Sequence[str]) -> str:
    """Say how two lists of class names differ: the first few names that are in one list
    only, or else the first place where the order differs. one, another: whose lists
    they are."""
    here, there = set(_plain(names)), set(_plain(others))
    only = [
        (whose, [name for name, plain in zip(own, _plain(own), strict=True) if plain not in other])
        for whose, own, other in ((one, names, there), (another, others, here))
    ]
    if any(lone for _, lone in only):
        return ", ".join(f"only {whose} has {some(lone)}" for whose, lone in only if lone)
    for i, (a, b) in enumerate(zip(names, others, strict=False)):
        if not same_names([a], [b]):
            return f"class {i} is {a} in {one} and {b} in {another}"
    return f"{one} has {len(names)}, {another} {len(others)}"


def rows_by_name(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return for each wanted class its place among ``names``; None unless both name the
    same classes, each once."""
    places = {name: i for i, name in enumerate(_plain(names))}
    if not len(places) == len(names) == len(wanted) == len(set(_plain(wanted))):
        return None
    found = [places.get(name) for name in _plain(wanted)]
    return None if None in found else [place for place in found if place is not None]


def reorder_head(module: nn.Module, heads: Sequence[str], rows: Sequence[int]) -> bool:
    """Put the outputs of a model in another order: output i becomes what output rows[i]
    was.

    heads: names of the layers that make the outputs; a model may have several. Returns
    False, and changes nothing, if a head isn't one layer with a row for each class.
    """
    tensors = []
    for head in heads:
        layer = module.get_submodule(head)
        own = [getattr(layer, "weight", None), getattr(layer, "bias", None)]
        tensors += [tensor for tensor in own if tensor is not None]
        if own[0] is None:
            return False
    if not tensors or any(len(tensor) != len(rows) for tensor in tensors):
        return False
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(tensor[list(rows)])
    return True


def _plain(names: Sequence[str]) -> list[str]:
    return list(map(same, names))
