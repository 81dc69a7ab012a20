"""Load timm models as teachers and students, with their weights, input size and
normalisation."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cache.format.schema import architecture
from pipeline.config import ModelSpec
from pipeline.models.checkpoints import Checkpoint, Tensors, fitting, read, require_readable
from pipeline.models.classes import difference, reorder_head, rows_by_name, same_names
from pipeline.models.model import Model, ModelError
from pipeline.models.names import ALIASES, resolve
from pipeline.runtime.progress import say

# Of each tensor by its name: shape, and whether it holds fractions.
Shapes = dict[str, tuple[torch.Size, bool]]
# Usual input sizes in pixels, tried where a file's shapes don't tell the size.
SIZES = (224, 384, 256, 192, 448, 512, 320, 288, 160, 128, 96, 336, 240, 64, 32)


@dataclass(frozen=True)
class Drop:
    """What a student leaves out at random in training.

    dropout: share of the features before the head. path: greatest probability that a
    block is left out (stochastic depth, Huang et al., arXiv 1603.09382). None: the
    model's own, which mostly is 0.
    """

    dropout: float | None = None
    path: float | None = None

    def options(self, name: str) -> dict[str, float]:
        """Return timm's options. Raises ModelError if the model doesn't have one."""
        found = {}
        for key, option, value in (
            ("train.dropout", "drop_rate", self.dropout),
            ("train.drop_path", "drop_path_rate", self.path),
        ):
            if value is None:
                continue
            found[option] = value
            if ":" in name:  # of the hub or a folder: known when it is made
                continue
            with torch.device("meta"):  # without memory
                try:
                    timm.create_model(architecture(name), pretrained=False, **{option: value})
                except TypeError:
                    raise ModelError(
                        f"timm's {name} has no {option}, and {key} is {value:g}; leave {key} out"
                    ) from None
        return found


def load(
    spec: ModelSpec,
    *,
    classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    drop: Drop | None = None,
) -> Model:
    """Build a model with its weights, on the CPU, in evaluation mode.

    classes: number of classes. A head of another size is replaced by a new head, and
    the model's notes say so. None: as many as the weights have. image_size: input size
    in pixels, which takes precedence over the spec's and the model's own. seed: of
    random weights and of a new head. class_names: names of the classes, in place of
    ``classes``. A head that knows these classes in another order is put in this order;
    a head of other classes is replaced. drop: dropout and stochastic depth in training;
    None: the model's own. Raises ModelError.
    """
    hub = spec.checkpoint is None and spec.pretrained
    name = resolve(spec.model, hub=hub)
    checkpoint = read(spec.checkpoint) if spec.checkpoint is not None else None
    written = checkpoint.header if checkpoint else {}
    if written and architecture(written["model"]) != architecture(name):
        raise ModelError(
            f"{spec.checkpoint} holds a {written['model']}, not a {name}; pass it as "
            f"{architecture(written['model'])}={spec.checkpoint}"
        )
    if written and "." not in spec.model:
        # Keep the tag that the weights started from: timm's default tag may be another.
        name = written["model"]
    config = _config(name)
    extra = (drop or Drop()).options(name)
    asked = image_size or spec.image_size
    found = _find(checkpoint, name, config, asked) if checkpoint else None
    size = found.size if found else asked or config["input_size"][-1]
    notes = list(found.notes) if found else []
    if hub and spec.model in ALIASES:
        notes.append(f"{spec.model} stands for {name}, as in the paper and in the timm of 2020")
    count = len(class_names) if class_names is not None else classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if found:
            module = found.module(name, config, extra)
        elif spec.pretrained:
            if not name.startswith("local-dir:"):
                say(f"fetching the weights of {name}, unless they are in the cache")
            module = _create(name, pretrained=True, **_size_option(config, size), **extra)
        else:
            heads = count or config["num_classes"]
            module = _create(
                name, pretrained=False, num_classes=heads, **_size_option(config, size), **extra
            )
            notes.append(f"{name} starts from random weights")
        model = Model(
            module,
            name,
            module.num_classes,
            size,
            _colour(spec.mean or written.get("mean") or config["mean"]),
            _colour(spec.std or written.get("std") or config["std"]),
            written.get("interpolation")
            or ("bilinear" if config.get("interpolation") == "bilinear" else "bicubic"),
            notes,
            _names_of(written if checkpoint else config if spec.pretrained else {}, module),
            found.entry if found else None,
        )
        _adapt_head(model, config, count, class_names)
    module.eval()
    try:
        with torch.inference_mode():
            module(torch.zeros(1, 3, size, size))
    except Exception as error:  # patch sizes, windows and poolings fail in many ways
        raise ModelError(
            f"{name} can't take {size} px ({shorten(str(error), 160, placeholder=' …')}); choose "
            f"another image_size"
        ) from None
    # Channels last, like the renderer's pixels: convolutions are faster.
    model.module = module.to(memory_format=torch.channels_last)
    return model


def require_known(specs: Sequence[ModelSpec]) -> None:
    """Require that timm knows each model, and that the files of weights are there.
    Raises ModelError."""
    for spec in specs:
        resolve(spec.model, hub=spec.checkpoint is None and spec.pretrained)
        if spec.checkpoint is not None:
            require_readable(spec.checkpoint)


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


@dataclass(frozen=True)
class _Found:
    """Weights in a file, that fit a model."""

    path: str  # as the user named the file
    weights: Tensors
    classes: int
    size: int  # input size of the model, pixels
    made_for: int  # input size that the weights were made for, pixels
    entry: str | None
    notes: list[str]

    def module(self, name: str, config: dict, extra: dict[str, float]) -> Any:
        """Create the model, with these weights. extra: more options of timm's."""
        options = _size_option(config, self.size) | extra
        module = _create(name, pretrained=False, num_classes=self.classes, **options)
        weights = self.weights
        if self.made_for != self.size:
            weights = _resampled(module, weights) or {}
            if not weights:
                raise ModelError(
                    f"{self.path} was made for {self.made_for} px, and timm can't resample "
                    f"{name} to {self.size} px; pass --image-size {self.made_for}, or set "
                    f"image_size: {self.made_for}"
                )
        module.load_state_dict(weights, strict=False)
        return module


def _find(checkpoint: Checkpoint, name: str, config: dict, asked: int | None) -> _Found:
    """Find a model's weights in a file, and the input size that they were made for.

    asked: input size in pixels that the user wants; None: the file's own. Raises
    ModelError if the weights don't fit.
    """
    written = checkpoint.header.get("image_size")
    default = config["input_size"][-1]
    size = asked or written or default
    path = f"{checkpoint.path}" + (f"#{checkpoint.entry}" if checkpoint.entry is not None else "")
    names = _shapes(name, config, size)
    needed = [key for key in names if not _counts(key)]
    chosen = checkpoint.choose(needed, name)
    weights, notes, made_for = chosen.weights, list(chosen.notes), size
    if weights.keys() - names.keys() or set(needed) - weights.keys():
        theirs = _renamed(checkpoint, weights, _meta(name, config, size))
        if theirs is not None:
            weights = theirs
            notes.append(f"tensors of {path} renamed as timm does for weights of {name}'s authors")
    classes = _head_size(weights, config, checkpoint, path)
    own = _shapes(name, config, size, classes)
    if wrong := _wrong(own, weights):
        explained = (
            _made_for(weights, name, config, classes, written)
            if not set(needed) - weights.keys()
            else None
        )
        if explained is None:
            raise ModelError(
                f"{path} doesn't fit {name}: {len(wrong)} tensors are missing, foreign or of "
                f"another shape, the first is {wrong[0]} ({name} has {len(own)}); "
                f"{_repair(checkpoint, path)}"
            )
        made_for = explained
        if asked is None and written is None:
            size = made_for
            notes.append(f"{path} was made for {size} px, not for {name}'s {default} px")
        else:
            notes.append(
                f"position embedding of {path} resampled from {made_for} px to {size} px, as timm "
                f"does"
            )
    if infinite := [key for key, tensor in weights.items() if not _finite(tensor)]:
        notes.append(
            f"{len(infinite)} of {len(weights)} tensors of {path} hold values that aren't finite, "
            f"the first is {infinite[0]}"
        )
    return _Found(path, weights, classes, size, made_for, chosen.entry, notes)


def _finite(tensor: torch.Tensor) -> bool:
    # torch can't ask eight bits.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _renamed(checkpoint: Checkpoint, nearest: Tensors, module: nn.Module) -> Tensors | None:
    """Return the weights in a file under a model's own names, if timm knows the names
    that the model's authors gave them; None if it doesn't. Tensors are renamed or left
    out, and never changed."""
    sets = checkpoint.sets
    own = {key for key in module.state_dict() if not _counts(key)}
    for tensors in (
        nearest,
        *([sets[checkpoint.entry]] if checkpoint.entry in sets else sets.values()),
    ):
        converted = _converted(module, tensors)
        same = {id(tensor) for tensor in tensors.values()}
        if own <= converted.keys() != tensors.keys() and all(
            id(tensor) in same for tensor in converted.values()
        ):
            return converted
    return None


def _converted(module: nn.Module, weights: Tensors) -> Tensors:
    """Return weights as timm converts them for a model; empty if timm can't."""
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(dict(weights), module)) if convert else {}
    except Exception:  # tensors that timm doesn't expect fail in many ways
        return {}


def _counts(key: str) -> bool:
    """Return whether a tensor only counts the steps of a training. Old files lack these
    tensors."""
    return key.endswith("num_batches_tracked")


def _meta(name: str, config: dict, size: int, classes: int | None = None) -> nn.Module:
    """Build a model without memory (meta device), for an input size in pixels. classes:
    of the head; None: timm's number."""
    head = {} if classes is None else {"num_classes": classes}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _create(name, pretrained=False, **head, **_size_option(config, size))


def _shapes(name: str, config: dict, size: int, classes: int | None = None) -> Shapes:
    """Return the shapes of a model's tensors (``_meta``)."""
    return _of(_meta(name, config, size, classes))


def _of(module: nn.Module) -> Shapes:
    return {key: _shape(key, tensor) for key, tensor in module.state_dict().items()}


def _shape(key: str, tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point() or _counts(key)


def _wrong(own: Shapes, weights: Tensors) -> list[str]:
    """Return the names of tensors that are missing, foreign or of another shape."""
    return [
        *sorted(key for key in own.keys() - weights.keys() if not _counts(key)),
        *sorted(weights.keys() - own.keys()),
        *sorted(
            key for key in own.keys() & weights.keys() if own[key] != _shape(key, weights[key])
        ),
    ]


def _made_for(
    weights: Tensors, name: str, config: dict, classes: int, written: int | None
) -> int | None:
    """Return the input size in pixels for which a model has exactly these tensors; None
    if there is none, or if the shapes don't depend on the size.

    written: the size that the file tells, if it does.
    """
    if not config.get("fixed_input_size"):
        return None
    default = config["input_size"][-1]
    for size in dict.fromkeys([written or default, default, *_sizes_of_grid(weights), *SIZES]):
        try:
            if not _wrong(_shapes(name, config, size, classes), weights):
                return size
        except ModelError:  # a size that the model can't take
            continue
    return None


def _sizes_of_grid(weights: Tensors) -> list[int]:
    """Return the input sizes that a position embedding may be for: a square of patches,
    behind none or a few tokens of another kind."""
    embedding, patch = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if embedding is None or patch is None or embedding.ndim != 3 or patch.ndim != 4:
        return []
    sides = {math.isqrt(max(0, embedding.shape[1] - tokens)) for tokens in range(9)}
    return [side * patch.shape[-1] for side in sorted(sides, reverse=True) if side]


def _resampled(module: nn.Module, weights: Tensors) -> Tensors | None:
    """Resample position embeddings to a model's input size, as timm does for its own
    weights; None if timm can't."""
    converted = _converted(module, weights)
    return None if _wrong(_of(module), converted) else converted


def _head_size(weights: Tensors, config: dict, checkpoint: Checkpoint, path: str) -> int:
    for head in _heads(config):
        for suffix in (".weight", ".bias"):
            if head + suffix in weights and weights[head + suffix].ndim:
                return weights[head + suffix].shape[0]
    raise ModelError(
        f"{path} has no classifier {config.get('classifier') or ()!r}, so it is no whole "
        f"{config['architecture']}; {_repair(checkpoint, path)}"
    )


def _heads(config: dict) -> tuple[str, ...]:
    """Return the names of the layers that make a model's outputs."""
    heads = config.get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _repair(checkpoint: Checkpoint, path: str) -> str:
    """Return the repair for weights that don't fit: name their model, if it is one of
    the paper's."""
    suited = []
    for candidate in dict.fromkeys(architecture(name) for name in ALIASES.values()):
        with torch.device("meta"):
            own = timm.create_model(candidate).state_dict()
        needed = [key for key in own if not _counts(key)]
        if any(
            part.keys() <= own.keys()
            and all(own[key].shape[1:] == tensor.shape[1:] for key, tensor in part.items())
            for tensors in checkpoint.sets.values()
            for part in fitting(tensors, needed).values()
        ):
            suited.append(f"{candidate}={path}")
    if suited:
        return f"its tensors are those of a model of the paper: pass {' or '.join(suited)}"
    if set(checkpoint.sets) == {""}:
        return "name its model before the ="
    return f"the file holds {checkpoint.content}; name its model before the ="


def _names_of(facts: dict, module: Any) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint's header or timm's config tells; None if
    it tells none for this number of outputs."""
    names = facts.get("class_names") or facts.get("label_names")
    if isinstance(names, dict):  # of timm's configs: index → name
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return tuple(map(str, names)) if names and len(names) == module.num_classes else None


def _adapt_head(
    model: Model, config: dict, classes: int | None, class_names: Sequence[str] | None
) -> None:
    """Give a model the outputs that are wanted, and say so in its notes.

    classes: how many; None: leave the model as it is. class_names: their names, if they
    are known.
    """
    known, module, name = model.class_names, model.module, model.name
    why = None
    if classes is not None and model.classes != classes:
        why = f"of {model.classes} classes"
    elif class_names is not None and known is not None and not same_names(known, class_names):
        differing = difference("the model", known, "the data", class_names)
        rows = rows_by_name(known, class_names)
        if rows is None or not reorder_head(module, _heads(config), rows):
            why = f"of other classes ({differing})"
        else:
            model.class_names = tuple(class_names)
            model.notes.append(
                f"{name} knows the classes in another order ({differing}); its head was put in the "
                f"data's order"
            )
    if why is not None:
        model.module.reset_classifier(classes)  # type: ignore[operator]
        model.notes.append(f"{name} had a head {why}; it starts with a new one of {classes}")
        model.classes, model.class_names = classes or 0, None
