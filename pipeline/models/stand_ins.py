"""Read what torch.save wrote as tensors, numbers and strings. Every other object in the
file gets a stand-in, so that nothing in the file is executed."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

# The beginning of torch.save's format before torch 1.6: the pickle of its magic number.
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PICKLES = 4  # magic number, version, facts of the machine, content


class StandIn(list):
    """Stands in for an object that a pickle asks for. A stand-in keeps what the pickle
    says of the object, and runs nothing."""

    said: tuple = ()  # arguments of the object's constructor
    state: Any = ()

    def __init__(self, *said: object) -> None:
        super().__init__()
        self.said = said

    def __setstate__(self, state: Any) -> None:
        self.state = state

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key, or in a set

    def __repr__(self) -> str:
        return name_of(type(self))

    def __eq__(self, other: object) -> bool:
        return self is other


def name_of(stand_in: type[StandIn]) -> str:
    """Return the full name of the class or function that a stand-in stands in for."""
    return f"{stand_in.__module__}.{stand_in.__qualname__}"


class _Mapping:
    """Stands in for a subclass of dict: torch fills only its own kinds of dict."""

    def __new__(cls, *said: object) -> Any:
        """Return an empty dict."""
        return OrderedDict()


def load(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, on the CPU.

    torch.load reads tensors only. Where the file names a class or a function that torch
    doesn't know as harmless, a ``StandIn`` of that name takes its place. Raises errors
    of many types for a damaged file, and pickle.UnpicklingError for a file that torch
    can't read as tensors only.
    """
    names = _foreign(path)
    stand_ins: dict[str, type] = {}
    for name in names:
        module, _, own = name.rpartition(".")
        stand_ins[name] = type(own, (StandIn,), {"__module__": module})
    while True:
        known: list = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with (
                torch.serialization.safe_globals(known),
                warnings.catch_warnings(),
                path.open("rb") as file,  # by its path, a file's ending would decide
            ):
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Only the error tells which class is a subclass of dict.
            filled = re.search(r"SETITEMS? for dict.* but got <class '(.+)'>", str(error))
            if not filled or stand_ins.get(filled[1], _Mapping) is _Mapping:
                raise
            stand_ins[filled[1]] = _Mapping


def _foreign(path: Path) -> set[str]:
    """Return the full names of the classes and functions that a file asks for, at least
    of those that torch doesn't know as harmless. The file is only disassembled."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    names = set()
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    # Names of Python 2, as torch translates them.
                    module, name = NAME_MAPPING.get(
                        (module, name), (IMPORT_MAPPING.get(module, module), name)
                    )
                    names.add(f"{module}.{name}")
    return names
