"""Load timm models as teachers and students, with their weights, input size and
normalisation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cache.format.schema import architecture
from pipeline.config import ModelSpec
from pipeline.models.model import METADATA, Model, ModelError
from pipeline.models.names import ALIASES, resolve
from pipeline.runtime.progress import say


def load(
    spec: ModelSpec, *, classes: int | None = None, image_size: int | None = None, seed: int = 0
) -> Model:
    """Build a model with its weights, on the CPU, in evaluation mode.

    classes: number of classes. A head of another size is replaced by a new head, and
    the model's notes say so. None: as many as the weights have. image_size: input size
    in pixels, which takes precedence over the spec's and the model's own. seed: of
    random weights and of a new head. Raises ModelError.
    """
    hub = spec.checkpoint is None and spec.pretrained
    name = resolve(spec.model, hub=hub)
    weights, written = _read(Path(spec.checkpoint)) if spec.checkpoint else (None, {})
    if written and architecture(written["model"]) != architecture(name):
        raise ModelError(
            f"{spec.checkpoint} holds a {written['model']}, not a {name}; pass it as "
            f"{architecture(written['model'])}={spec.checkpoint}"
        )
    if written and "." not in spec.model:
        # Keep the tag that the weights started from: timm's default tag may be another.
        name = written["model"]
    config = _config(name)
    size = image_size or spec.image_size or written.get("image_size") or config["input_size"][-1]
    options = _size_option(config, size)
    notes = []
    if hub and spec.model in ALIASES:
        notes.append(f"{spec.model} stands for {name}, as in the paper and in the timm of 2020")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is not None:
            found = _head_size(weights, config, str(spec.checkpoint))
            module = _create(name, pretrained=False, num_classes=found, **options)
            _fit(module, weights, spec.checkpoint, name)
        elif spec.pretrained:
            if not name.startswith("local-dir:"):
                say(f"fetching the weights of {name}, unless they are in the cache")
            module = _create(name, pretrained=True, **options)
            found = module.num_classes
        else:
            found = classes or config["num_classes"]
            module = _create(name, pretrained=False, num_classes=found, **options)
            notes.append(f"{name} starts from random weights")
        if classes is not None and found != classes:
            module.reset_classifier(classes)
            notes.append(
                f"{name} had a head of {found} classes; it starts with a new one of {classes}"
            )
    module.eval()
    try:
        with torch.inference_mode():
            module(torch.zeros(1, 3, size, size))
    except Exception as error:  # patch sizes, windows and poolings fail in many ways
        raise ModelError(
            f"{name} can't take {size} px ({shorten(str(error), 160, placeholder=' …')}); choose "
            f"another image_size"
        ) from None
    return Model(
        # Channels last, like the renderer's pixels: convolutions are faster.
        module.to(memory_format=torch.channels_last),
        name,
        classes if classes is not None else found,
        size,
        _colour(spec.mean or written.get("mean") or config["mean"]),
        _colour(spec.std or written.get("std") or config["std"]),
        written.get("interpolation")
        or ("bilinear" if config.get("interpolation") == "bilinear" else "bicubic"),
        notes,
    )


def load_teachers(specs: Sequence[ModelSpec], device: torch.device) -> list[Model]:
    """Load teachers onto the device. Raises ModelError unless each has weights, all
    have the same number of classes, and no two have the same weights."""
    if not specs:
        raise ModelError(
            "there is no teacher; name some under teachers: in the config, or with --teacher "
            "MODEL[=CHECKPOINT]"
        )
    teachers = []
    for spec in specs:
        if spec.checkpoint is None and not spec.pretrained:
            raise ModelError(
                f"teacher {spec.model} has no weights; give it a checkpoint, or drop pretrained: "
                f"false"
            )
        teachers.append(load(spec))
    counts = {t.classes for t in teachers}
    if len(counts) > 1:
        raise ModelError(
            "the teachers' classes differ: "
            + ", ".join(f"{t.name} has {t.classes}" for t in teachers)
            + "; their mean needs the same ones"
        )
    seen: dict[str, str] = {}
    for teacher in teachers:
        digest = teacher.digest()
        if digest in seen:
            raise ModelError(
                f"teachers {seen[digest]} and {teacher.name} have the same weights; an ensemble "
                f"needs different models"
            )
        seen[digest] = teacher.name
    return [t.to(device) for t in teachers]


def forward_flops(spec: ModelSpec) -> tuple[float, int]:
    """Return (floating-point operations of one image's forward pass, input size in
    pixels). Torch counts the operations on a model without memory (meta device), so no
    weights are needed."""
    name = resolve(spec.model)
    config = _config(name)
    size = spec.image_size or config["input_size"][-1]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _create(name, pretrained=False, **_size_option(config, size)).eval()(
            torch.zeros(1, 3, size, size)
        )
    return float(counter.get_total_flops()), size


def _colour(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _config(name: str) -> dict:
    if ":" in name:
        return _create(name, pretrained=False).pretrained_cfg
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        config = None
    if config is None:
        return _create(name, pretrained=False).pretrained_cfg
    return config.to_dict() | {"architecture": config.architecture}


def _size_option(config: dict, size: int) -> dict[str, int]:
    """Return timm's option for another input size than the model's own, if it needs an
    option."""
    return (
        {"img_size": size}
        if size != config["input_size"][-1] and config.get("fixed_input_size")
        else {}
    )


def _create(name: str, *, pretrained: bool, **options: Any) -> Any:
    for noisy in ("timm", "huggingface_hub"):  # they log every retry; the error below says it once
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        # timm, huggingface_hub and the network raise errors of many types; the user's
        # repair is the same.
        text = shorten(str(error), 160, placeholder=" …")
        if pretrained:
            raise ModelError(
                f"the weights of {name} can't be fetched ({text}); check the network, pass "
                f"{architecture(name)}=CHECKPOINT, or start a student with pretrained: false"
            ) from None
        raise ModelError(
            f"timm can't build {name} with {options} ({text}); choose another image size or model"
        ) from None


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return (state dict, this tool's description of the model or {}). Only tensors are
    read: nothing in the file is executed."""
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}; check the path after MODEL=")
    if not os.access(path, os.R_OK):
        raise ModelError(f"{path} may not be read (no permission); ask for it, or pass a copy")
    try:
        written = {}
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as f:
                written = json.loads((f.metadata() or {}).get(METADATA, "{}"))
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        if not weights or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
            raise ValueError("it holds something else than named tensors")
        return weights, written
    except Exception as error:
        # A damaged or foreign file fails in many ways inside safetensors and torch.
        raise ModelError(
            f"{path} holds no weights that can be read "
            f"({shorten(str(error), 160, placeholder=' …')}); pass a .safetensors, .pth or .pt file"
        ) from None


def _head_size(weights: dict[str, torch.Tensor], config: dict, path: str) -> int:
    heads = config.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        for suffix in (".weight", ".bias"):
            if head + suffix in weights:
                return weights[head + suffix].shape[0]
    raise ModelError(
        f"{path} has no classifier {heads!r}, so it is no whole {config['architecture']}; "
        f"{_repair(weights, path)}"
    )


def _repair(weights: dict[str, torch.Tensor], path: str | None) -> str:
    """Return the repair for weights that don't fit: name their model, if it is one of
    the paper's."""
    fitting = []
    for candidate in dict.fromkeys(architecture(name) for name in ALIASES.values()):
        with torch.device("meta"):
            own = timm.create_model(candidate).state_dict()
        counters = {k for k in own if k.endswith("num_batches_tracked")}
        if own.keys() - counters == weights.keys() - counters and all(
            own[k].shape[1:] == w.shape[1:] for k, w in weights.items()
        ):
            fitting.append(f"{candidate}={path}")
    return (
        f"its tensors are those of a model of the paper: pass {' or '.join(fitting)}"
        if fitting
        else "name its model before the ="
    )


def _fit(module: nn.Module, weights: dict[str, torch.Tensor], path: str | None, name: str) -> None:
    own = module.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    wrong = sorted(own.keys() - weights.keys() - optional) + sorted(weights.keys() - own.keys())
    wrong += sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)
    if wrong:
        raise ModelError(
            f"{path} doesn't fit {name}: {len(wrong)} of {len(own)} tensors are missing, foreign "
            f"or of another shape, the first is {wrong[0]}; "
            f"{_repair(weights, path)}"
        )
    module.load_state_dict(weights, strict=False)
