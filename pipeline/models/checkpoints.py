"""Read files of weights, made by this tool, by timm or by others, and find in them the
weights of a model."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import safetensors.torch
import torch

from pipeline.config import ModelSpec
from pipeline.models import stand_ins
from pipeline.models.model import METADATA, ModelError
from pipeline.models.stand_ins import StandIn
from pipeline.runtime.wording import some

Tensors = dict[str, torch.Tensor]  # a state dict: name → tensor
TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")  # entries in timm's order
# Wrappers of torch (compile, FSDP, activation checkpointing), which add to the names.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
EMA = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
OTHERS = {b"\x89HDF": "an HDF5 file, as Keras writes it", b"GGUF": "a GGUF file"}
WHOLE = "a whole pickled model"
PASS = "pass a .safetensors, .pth or .pt file"
AGAIN = "download or copy it again"
LATER = {66, 67, *range(0x8A, 0x99)}  # operations of pickle's protocols from 3 on
DEPTH = 3  # levels of sections in which weights are looked for
LISTED = 8  # entries that an error lists


@dataclass(frozen=True)
class Chosen:
    """The weights of a model in a file.

    weights: under the model's own names; possibly with further tensors, that the model
    doesn't have. entry: the entry of the file, if the file offered a choice or the user
    chose. notes: for the user.
    """

    weights: Tensors
    entry: str | None
    notes: list[str]


@dataclass(frozen=True)
class _Fit:
    """A part of a file that holds all tensors of a model."""

    entry: str  # keys of the sections that lead to the state dict, with dots; may be empty
    prefix: str  # of the tensors' names, with its last dot; may be empty
    weights: Tensors  # without the prefix
    alone: bool  # in its entry

    @property
    def name(self) -> str:
        """Return the name by which a user can choose the part."""
        own = "" if self.entry and self.alone else self.prefix.rstrip(".")
        return ".".join(part for part in (self.entry, own) if part)

    @property
    def averaged(self) -> bool:
        """Return whether the part is an exponential moving average, by its name."""
        return bool(EMA.search(self.name))

    def called(self, wanted: str) -> bool:
        """Return whether a user means the part by ``wanted``."""
        prefix = self.prefix.rstrip(".")
        return wanted.rstrip(".") in (self.name, self.entry, prefix, f"{self.entry}.{prefix}")


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights.

    entry: the entry that the user wants; None: none was named. header: this tool's own
    description of the model; empty in files of others. sets: entry → tensors by name;
    the entry is empty for tensors that are in no section. content: what the file holds,
    in words.
    """

    path: Path
    entry: str | None
    header: dict
    sets: dict[str, Tensors]
    content: str

    def choose(self, own: Collection[str], model: str) -> Chosen:
        """Find the weights of a model.

        own: names of the tensors that the model needs. model: its name. If nothing in
        the file has all of these tensors, the part that has most of them is returned.
        Raises ModelError if the user wants an entry that is not there, or if several
        parts of the file fit and timm has no rule which of them to take.
        """
        fits = [
            _Fit(entry, prefix, weights, len(parts) == 1)
            for entry, tensors in self.sets.items()
            if (parts := fitting(tensors, own))
            for prefix, weights in parts.items()
        ]
        taken = self._taken(fits, model)
        if taken is None:
            return Chosen(self._nearest(own), self.entry, [])
        offered = len(fits) > 1 or self.entry is not None
        return Chosen(
            taken.weights,
            (taken.name or None) if offered else None,
            [*self._other_entries(taken, fits), *self._left_out(taken, fits)],
        )

    def _taken(self, fits: list[_Fit], model: str) -> _Fit | None:
        """Return the part that the user, or else timm's order, chooses; None if no part
        fits, or if the user's entry doesn't fit."""
        found = fits
        if self.entry is not None:
            found = [fit for fit in fits if fit.called(self.entry)]
            if not found and self.entry.lower() == "ema":
                found = [fit for fit in fits if fit.averaged]
            if not found and self.entry not in self.sets:
                there = [fit.name for fit in fits if fit.name] or [one for one in self.sets if one]
                raise ModelError(
                    f"{self.path} has no entry {self.entry!r}; "
                    + (
                        f"its weights are in {some(there, LISTED)}: pass {self.path}#{there[0]}"
                        if there
                        else f"its weights are in no entry: pass {self.path}"
                    )
                )
        else:
            first = next((name for name in TIMM for fit in found if fit.entry == name), None)
            entries = {fit.entry for fit in found if fit.averaged} if first is None else {first}
            if len(entries) == 1:
                found = [fit for fit in found if fit.entry in entries]
        if len({fit.entry for fit in found}) == 1:
            found = [fit for fit in found if not fit.prefix] or found
        if len(found) > 1:
            names = [fit.name or fit.entry for fit in found]
            raise ModelError(
                f"{self.path} holds several sets of weights for {model}: "
                f"{some(names, LISTED)}; choose one, like {self.path}#{names[0]}"
            )
        return found[0] if found else None

    def _nearest(self, own: Collection[str]) -> Tensors:
        """Return the part that has the most of a model's tensors."""
        sets = [self.sets[self.entry]] if self.entry in self.sets else list(self.sets.values())
        parts = [
            (len(names), -number, prefix, tensors)
            for number, tensors in enumerate(sets)
            for prefix, names in _prefixes(tensors, own).items()
        ]
        if not parts:
            return max(sets, key=len)
        _, _, prefix, tensors = max(parts, key=lambda part: part[:2])
        return _without(tensors, prefix)

    def _other_entries(self, taken: _Fit, fits: list[_Fit]) -> list[str]:
        others = [fit for fit in fits if fit is not taken and fit.name]
        # Say if an entry of timm's comes first and doesn't fit.
        unfit = [
            name
            for name in TIMM[: TIMM.index(taken.entry) if taken.entry in TIMM else len(TIMM)]
            if name in self.sets and all(fit.entry != name for fit in fits)
        ]
        if self.entry is not None or not (others or unfit):
            return []
        how = ", the moving average" if taken.averaged else ""
        also = "; ".join(
            [f"{self.path}#{fit.name} takes the other" for fit in others[:LISTED]]
            + [f"its {name} has other tensors" for name in unfit]
        )
        return [
            f"{self.path} holds several sets of weights: "
            f"{taken.name or 'the one without a prefix'} was taken{how}; {also}"
        ]

    def _left_out(self, taken: _Fit, fits: list[_Fit]) -> list[str]:
        found = {
            fit.prefix + name for fit in fits if fit.entry == taken.entry for name in fit.weights
        }
        left = [name for name in self.sets[taken.entry] if name not in found]
        if not left:
            return []
        return [
            f"{len(left)} of {len(self.sets[taken.entry])} tensors of {self.path} lie outside of "
            f"{taken.prefix} and were left out, the first is {left[0]}"
        ]


def fitting(tensors: Tensors, own: Collection[str]) -> dict[str, Tensors]:
    """Return the parts of a state dict that have all tensors of a model: prefix → the
    tensors below the prefix, by their names without it.

    A part within another part belongs to itself alone.
    """
    needed = len(set(own))
    prefixes = [p for p, names in _prefixes(tensors, own).items() if len(names) == needed]
    return {
        prefix: {
            name: tensor
            for name, tensor in _without(tensors, prefix).items()
            if not any(
                (prefix + name).startswith(other)
                for other in prefixes
                if other != prefix and other.startswith(prefix)
            )
        }
        for prefix in prefixes
    }


def _prefixes(tensors: Tensors, own: Collection[str]) -> dict[str, set[str]]:
    """Return prefix → the model's tensors that are there with that prefix."""
    wanted, found = set(own), dict[str, set[str]]()
    for name in tensors:
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            if name[start:] in wanted:
                found.setdefault(name[:start], set()).add(name[start:])
    return found


def _without(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def read(where: str) -> Checkpoint:
    """Read a file of weights: FILE, or FILE#ENTRY.

    A file whose own name is FILE#ENTRY is that file. Only tensors are read: nothing in
    the file is executed. Raises ModelError.
    """
    require_readable(where)
    path, entry = _split(where)
    try:
        kind = _kind(path)
        if kind == "safetensors":
            with safetensors.safe_open(path, "pt") as file:
                header = _header(path, (file.metadata() or {}).get(METADATA))
            content: Any = safetensors.torch.load_file(path)
        else:
            header, content = {}, stand_ins.load(path)
    except ModelError:
        raise
    except Exception as error:
        # A damaged or foreign file fails in many ways inside safetensors and torch.
        raise _no_weights(path, *_reason(error)) from None
    sets = {name: _unwrapped(tensors) for name, tensors in _sets(content).items()}
    told = described(content)
    if not sets:
        raise _no_weights(path, f"it holds {told}", _repair_of(content) if WHOLE in told else PASS)
    return Checkpoint(path, entry, header, sets, told)


def _split(where: str) -> tuple[Path, str | None]:
    if "#" not in where or os.path.lexists(where):
        return Path(where), None
    cuts = [(where[: mark.start()], where[mark.end() :]) for mark in re.finditer("#", where)]
    # The names of folders and entries may hold a # too.
    file, entry = next((cut for cut in reversed(cuts) if Path(cut[0]).is_file()), cuts[-1])
    if not Path(file).is_file() and "/" in entry:
        return Path(where), None
    if not entry.strip():
        raise ModelError(f"{where} names no entry after the #; pass {file}, or {file}#ema")
    return Path(file), entry.strip()


def require_readable(where: str) -> None:
    """Require that FILE, or the file of FILE#ENTRY, can be read. Raises ModelError."""
    path, _ = _split(where)
    if path.is_dir():
        inside = [
            one.name
            for one in sorted(path.iterdir())
            if one.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
        ]
        raise ModelError(
            f"{path} is a folder, not a file of weights; "
            + (f"pass a file in it, like {path / inside[0]}" if inside else PASS)
        )
    if not path.exists():
        raise ModelError(f"there is no checkpoint {path}; check the path after MODEL=")
    if not path.is_file():
        raise ModelError(f"{path} is no file; {PASS}")
    if not os.access(path, os.R_OK):
        raise ModelError(f"{path} may not be read (no permission); ask for it, or pass a copy")


def _no_weights(path: Path, why: str, repair: str) -> ModelError:
    return ModelError(f"{path} holds no weights that can be read ({why}); {repair}")


def _kind(path: Path) -> str:
    """Return "safetensors" or "torch", by the beginning of a file. Raises ModelError
    for a file that is neither, and says what it is."""
    with path.open("rb") as file:
        head, size = file.read(512), path.stat().st_size
    if not head:
        raise _no_weights(path, "it is empty", AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise _no_weights(
            path, "it is a pointer of Git LFS", "run git lfs pull, or download the file itself"
        )
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 100_000_000:  # the largest header of safetensors
        if 8 + length > size:
            raise _no_weights(path, "it is cut off", AGAIN)
        return "safetensors"
    if head.startswith(b"PK"):
        _require_torch_zip(path)
        return "torch"
    if head.startswith(stand_ins.LEGACY):
        return "torch"
    packed = next((PACKED[mark] for mark in PACKED if head.startswith(mark)), None)
    if packed or head[257:262] == b"ustar":
        raise _no_weights(path, f"it is packed with {packed or 'tar'}", "unpack it first")
    if other := next((OTHERS[mark] for mark in OTHERS if head.startswith(mark)), None):
        raise _no_weights(path, f"it is {other}", PASS)
    if head.startswith(b"\x80"):
        raise _no_weights(path, "it is a pickle that torch.save didn't write", PASS)
    if not head.strip(b"\0"):
        raise _no_weights(path, "it begins with nothing but zeros", AGAIN)
    raise _no_weights(path, *_text(head))


def _text(head: bytes) -> tuple[str, str]:
    """Return why a file of text, or of an unknown format, holds no weights, and the
    repair."""
    text = " ".join(head.decode("utf-8", "replace").split())
    if re.match(r"<!doctype html|<html|<\?xml", text, re.IGNORECASE):
        return "it is a web page: a download that failed", "download it again"
    if '"weight_map"' in text or '"total_size"' in text:
        return "it is the index of weights in several files", "join them, and pass the one file"
    if "\ufffd" not in text[:-1] and text.isprintable():
        return f"it is a text: {shorten(text, 60, placeholder=' …')}", PASS
    return f"it begins with {head[:8]!r}, as no known format does", PASS


def _require_torch_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise _no_weights(path, "it is cut off", AGAIN)
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        raise _no_weights(
            path, "it is a TorchScript archive", "save the model's state_dict() and pass that"
        )
    if "data.pkl" not in inside:
        what = (
            "an archive of NumPy"
            if names and all(name.endswith(".npy") for name in names)
            else f"a zip archive of other files, like {names[0]}"
            if names
            else "an empty zip archive"
        )
        raise _no_weights(path, f"it is {what}", PASS)


def _reason(error: Exception) -> tuple[str, str]:
    """Return why safetensors or torch can't read a file, and the repair."""
    said = " ".join(str(error).split())
    operand = re.search(r"Unsupported operand (\d+)", said)
    if operand and int(operand[1]) in LATER:
        return (
            "it was pickled with another protocol than torch.save's own",
            "save it again with torch.save(torch.load(…), …)",
        )
    if blocked := re.search(
        r"GLOBAL (\S+) whose module \S+ is blocked|unrecognized function (.+?)(?: Check|$)", said
    ):
        return f"it asks for {blocked[1] or blocked[2]}, which may be a program", PASS
    if "IncompleteBuffer" in said or "not fully covered" in said:
        return "it is not as long as its header says", AGAIN
    if isinstance(error, EOFError) or re.search(r"exhausted|expected \d+ (more )?bytes", said):
        return "it is cut off", AGAIN
    if "Only persistent_load of storage" in said:  # in torch's format of old
        return f"it holds {WHOLE}", "save the model's state_dict() with torch.save and pass that"
    # torch wraps the reason in advice to trust the file.
    said = re.sub(r"^Weights only load failed.* WeightsUnpickler error: ", "", said)
    said = re.sub(r" Check the documentation of torch.load.*$", "", said)
    return shorten(said, 160, placeholder=" …") or type(error).__name__, PASS


def _header(path: Path, text: str | None) -> dict:
    """Return this tool's description of a model in the header of a file; empty without
    one."""
    if text is None:
        return {}
    try:
        header = json.loads(text)
        told = {key: header.get(key) for key in ("model", "image_size", "mean", "std")}
        ModelSpec.model_validate(told)
        names = header.get("class_names") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names is {names!r}")
        if header.get("interpolation") not in (None, "bilinear", "bicubic"):
            raise ValueError(f"interpolation is {header['interpolation']!r}")
    except Exception:  # whatever isn't as this tool writes it
        raise _no_weights(
            path, f"its header {METADATA!r} is damaged", "restore it from a copy"
        ) from None
    return header


def _sets(content: object, above: tuple = ()) -> dict[str, Tensors]:
    """Return entry → tensors by name, for every section that holds tensors. above: the
    sections that hold this one."""
    if not isinstance(content, Mapping) or any(content is one for one in above):
        return {}
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor) and _plain(v)}
    found = {"": tensors} if tensors else {}
    for key, value in named.items() if len(above) < DEPTH else ():
        for inner, tensors in _sets(value, (*above, content)).items():
            found[f"{key}.{inner}" if inner else key] = tensors
    return found


def _plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds its numbers one by one: it isn't sparse, quantised,
    or without content (meta)."""
    return (
        tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    )


def _unwrapped(tensors: Tensors) -> Tensors:
    return {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def described(content: object) -> str:
    """Say what a file holds: its entries, with the kind of each."""
    if isinstance(content, Mapping) and content:
        entries = [f"{key} ({_kind_of(value)})" for key, value in content.items()]
        return some(entries, LISTED)
    return _kind_of(content)


def _kind_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {' × '.join(map(str, value.shape)) or 'one number'}"
    if isinstance(value, StandIn):
        name = stand_ins.name_of(type(value))
        return f"{WHOLE}, {name}" if _is_module(value) else f"an object {name}"
    if isinstance(value, Mapping | list | tuple | set):
        return f"{len(value)} entries" if value else "nothing"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float | complex):
        return "a number"
    return "a text" if isinstance(value, str) else f"a {type(value).__name__}"


def _is_module(value: StandIn) -> bool:
    return isinstance(value.state, dict) and "_modules" in value.state


def _repair_of(content: object) -> str:
    what = "its" if isinstance(content, StandIn) else "that model's"
    return f"save {what} state_dict() with torch.save and pass that file"
