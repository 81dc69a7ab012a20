"""Read a recipe from YAML, apply overrides, and turn a pydantic error into one line."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import (
    Config,
    ConfigError,
    CropPolicy,
    CutMix,
    Discriminator,
    ModelSpec,
    Render,
    Section,
    Store,
    Train,
    nearest,
)


class _Loader(yaml.SafeLoader):
    """Reads YAML, with 1e-3 as a number. YAML 1.1 reads 1e-3 as a string, which nobody
    means."""


_Loader.yaml_implicit_resolvers = {
    k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


RECIPES = Path(__file__).resolve().parents[1] / "configs"


def found(path: Path) -> Path:
    """Resolve the bare name of one of the project's recipes (no folder, no ending) to
    its file.

    Returns ``path`` itself if it is no bare name, if a file of this name exists here,
    or if the project has no such recipe.
    """
    recipe = RECIPES / f"{path.name}.yaml"
    return recipe if path.name == str(path) and not path.exists() and recipe.is_file() else path


def load(
    path: str | Path, overrides: dict[str, Any] | None = None, settings: list[str] | None = None
) -> Config:
    """Read a YAML file, apply overrides, and validate the result.

    path: a file, or the bare name of a recipe of the project (``meal_v2_resnet50``).
    overrides: dotted key → value, applied first. settings: "dotted.key=YAML value",
    applied after the overrides. Raises ConfigError with one line that names the field,
    its value and the allowed values.
    """
    path = found(Path(path))
    try:
        document = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # a subclass of SafeLoader
    except OSError as error:
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        raise ConfigError(
            f"{path} can't be read ({error.strerror}); recipes of the project go by their "
            f"name{nearest(path.stem, known)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} must hold sections (teachers, crops, store, student, train), not a "
            f"{type(document).__name__}"
        )
    for key, value in (overrides or {}).items():
        _put(document, key, value)
    for setting in map(typed, settings or ()):
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting} must be KEY=VALUE, like --set train.lr=0.005")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting}: {text!r} is no YAML value") from None
        _put(document, key, value)
    return validate(document, f"{path}, with its overrides" if overrides or settings else str(path))


def validate(document: dict, source: str, section: type[Section] | None = None) -> Any:
    """Return the document as a Config, or as another section.

    source: the name of the document in the error. Raises ConfigError.
    """
    try:
        return (section or Config).model_validate(document)
    except ValidationError as error:
        problems = [
            _one_line(dict(p))
            for p in sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
        ]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {problems[0]}{more}") from None


def typed(text: str) -> str:
    """Return text of the command line as it was typed, where Python read its bytes in
    another encoding than UTF-8: in a locale of ASCII or ISO-8859-1."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:  # not typed in UTF-8, or not from the command line
        return text


def flat(document: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested sections to dotted keys, as --set takes them; lists of sections
    too (teachers.0.model)."""
    if (
        isinstance(document, list)
        and document
        and all(isinstance(value, dict) for value in document)
    ):
        document = dict(enumerate(document))
    if not isinstance(document, dict):
        return {prefix: document}
    return {
        k: v
        for key, value in document.items()
        for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _put(document: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place: Any = document
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(place, list):
            place = place[_index(place, name, key)]
        else:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"--set {key}: {where} is a value, not a section")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _index(place: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(place):
        raise ConfigError(
            f"--set {key}: {name!r} must be a number from 0 to {len(place) - 1}, the place in the "
            f"list"
        )
    return int(name)


def _one_line(problem: dict) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    kind, context, got = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        return (
            f"{where} is not known{nearest(str(problem['loc'][-1]), _fields(problem['loc'][:-1]))}"
        )
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        text = str(context["error"])
        return f"{where} {text}, got {_show(got)}" if where and not text.startswith(where) else text
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
    }
    if kind in bounds:
        word, bound = bounds[kind]
        return f"{where} must be {word} {_bound(context[bound])}, got {_show(got)}"
    if kind == "model_type":
        return (
            f"{where} must be a section with keys {', '.join(_fields(problem['loc']))}, got "
            f"{_show(got)}"
        )
    message = problem["msg"].replace("Input should be", "must be")
    return f"{where} {message[0].lower()}{message[1:]}, got {_show(got)}"


def _bound(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _show(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return repr(list(value) if isinstance(value, tuple) else value)


def _fields(location: tuple) -> list[str]:
    """Return the names of the keys that a section may hold."""
    sections: dict[str, type[Section]] = {
        "teachers": ModelSpec,
        "student": ModelSpec,
        "crops": CropPolicy,
        "store": Store,
        "render": Render,
        "train": Train,
    }
    if location[-1:] == ("discriminator",):
        return list(Discriminator.model_fields)
    if location[-1:] == ("cutmix",):
        return list(CutMix.model_fields)
    return list((sections[location[0]] if location else Config).model_fields)
