"""timm models as teachers and students: names, weights, own normalisation, and the ensemble's mean softmax. Only this module knows timm."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from textwrap import shorten

import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf
from timm.models._registry import _deprecated_models  # name of old → name with tag
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cache.schema import MealError, architecture
from pipeline.arithmetic import HALF, in_precision
from pipeline.config import ModelSpec
from pipeline.progress import say

METADATA = "meal_v2"  # key of a checkpoint's description in a safetensors header
# Names of models in the paper, in its authors' code and in the timm of 2020 that it used (0.2.1), and today's timm names of the same weights.
# Some of them mean other weights in today's timm: its resnet50 is a1_in1k, and its tf_efficientnet_b4 the Noisy Student, which would make the
# paper's pair of EfficientNets one model twice. Its efficientnet_b4 had no weights then, so the paper's can only be tf_efficientnet_b4;
# timm's of today is reached by its tag.
ALIASES = {
    "senet154": "senet154.gluon_in1k",
    "gluon_senet154": "senet154.gluon_in1k",
    "resnet152_v1s": "resnet152s.gluon_in1k",
    "gluon_resnet152_v1s": "resnet152s.gluon_in1k",
    "efficientnet_b4": "tf_efficientnet_b4.aa_in1k",
    "tf_efficientnet_b4": "tf_efficientnet_b4.aa_in1k",
    "efficientnet_b4_ns": "tf_efficientnet_b4.ns_jft_in1k",
    "tf_efficientnet_b4_ns": "tf_efficientnet_b4.ns_jft_in1k",
    "resnet50": "resnet50.ram_in1k",
    "resnet18": "resnet18.tv_in1k",
    "tf_mobilenetv3_small_075": "tf_mobilenetv3_small_075.in1k",
    "tf_mobilenetv3_small_100": "tf_mobilenetv3_small_100.in1k",
    "tf_mobilenetv3_large_100": "tf_mobilenetv3_large_100.in1k",
    "tf_efficientnet_b0": "tf_efficientnet_b0.aa_in1k",
    "efficientnet_b0": "efficientnet_b0.ra_in1k",
    "ig_resnext101_32x16d": "resnext101_32x16d.fb_wsl_ig1b_ft_in1k",  # timm makes 32x8d of these two without a word
    "ig_resnext101_32x32d": "resnext101_32x32d.fb_wsl_ig1b_ft_in1k",
}
GONE = dict.fromkeys(("resnext101_32x48d", "ig_resnext101_32x48d", "resnext101_32x48d_wsl"), "resnext101_32x32d.fb_wsl_ig1b_ft_in1k")


class ModelError(MealError):
    """A model that timm doesn't know, or weights that can't be had or don't fit."""


@dataclass
class Model:
    """A timm model with what it expects of its input. Calling it takes uint8 pixels and gives logits."""

    module: nn.Module
    name: str  # timm name with its tag
    classes: int
    image_size: int  # pixels
    mean: tuple[float, float, float]  # of RGB in 0 … 1
    std: tuple[float, float, float]
    interpolation: str  # of evaluation's resize
    notes: list[str] = field(default_factory=list)  # what a user should be told of how it was loaded

    def to(self, device: torch.device) -> Model:
        self.module.to(device)
        return self

    def introduction(self, role: str) -> list[str]:
        """Lines that tell a user what was loaded."""
        return [f"{role} {self.name}, {self.image_size} px, {self.classes} classes", *self.notes]

    def compiled(self, **options: bool) -> Model:
        """The same model, its weights too, that torch.compile makes faster: at the first call of each batch size, for a minute. Outputs are the same to
        rounding."""
        return replace(self, module=torch.compile(self.module, dynamic=False, options=options or None))

    def compiled_teacher(self, precision: str) -> Model:
        """Compile a model whose weights don't change any more.

        Freezing folds BatchNorm into the convolutions. In half precision that would be done with rounded weights, which multiplies the outputs' error
        (github.com/pytorch/pytorch/pull/145623 saw fourfold in float16 and eightfold in bfloat16), so there it is left out.
        """
        return self.compiled(freezing=True) if precision not in HALF else self.compiled()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, height, width, 3] → float32 [n, 3, height, width], (x / 255 − mean) / std, on the pixels' device."""
        mean, std = (_constant(c, pixels.device) for c in (self.mean, self.std))
        return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

    def __call__(self, pixels: torch.Tensor, precision: str = "float32") -> torch.Tensor:
        """uint8 [n, height, width, 3] on the model's device → float32 logits [n, classes]; ``precision`` of the forward pass."""
        x = self.normalise(pixels)
        half = HALF.get(precision)
        with in_precision(precision), torch.autocast(x.device.type, dtype=half, enabled=half is not None):
            return self.module(x).float()

    def digest(self) -> str:
        """Hex sha256 over the sorted tensors (name, dtype, shape, bytes): known by the weights, whatever file they came in."""
        h = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if name.endswith("num_batches_tracked"):  # counts training steps; no output depends on it
                continue
            h.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            h.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def describe(self) -> dict:
        """The model as provenance."""
        return {
            "model": self.name,
            "weights": self.digest(),
            "classes": self.classes,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }


@cache
def _constant(of_rgb: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """float32 [1, 3, 1, 1]; made once, since a GPU is waited for when it is given something."""
    with torch.inference_mode(False):  # a teacher may ask for it first, and a student that trains next
        return torch.tensor(of_rgb, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def imagenet_classes() -> list[str]:
    """WordNet ids of the 1,000 classes of ImageNet, in the order of the models' outputs (the list that timm ships)."""
    return ImageNetInfo("imagenet-1k").label_names()


def class_titles(names: Sequence[str]) -> list[str]:
    """What people call these classes: of WordNet ids their first word (n01440764 → tench), with the id where two have the same; of others the name itself."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in names):
        return list(names)
    told = {}
    for subset in ("imagenet-22k", "imagenet-1k"):
        info = ImageNetInfo(subset)
        told |= dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    titles = [told.get(name, name).partition(",")[0] for name in names]
    count = Counter(titles)
    return [title if count[title] == 1 else f"{title} ({name})" for title, name in zip(titles, names, strict=True)]


def resolve(name: str, *, hub: bool = True) -> str:
    """A timm name with the tag of its weights: ``resnet50`` → ``resnet50.ram_in1k`` (ALIASES), ``resnet34`` → ``resnet34.a1_in1k`` (timm's choice).

    hub: whether timm's weights are meant; where they aren't, a name without a tag names the architecture alone, and stays without.
    Raises ModelError with the nearest name if timm has no such model.
    """
    if ":" in name:  # hf-hub:… and local-dir:…, which timm resolves itself
        return name
    if name in GONE:
        raise ModelError(f"timm has no {name} any more; the nearest is {GONE[name]}")
    if full := ALIASES.get(name) or _deprecated_models.get(name):
        name = full if hub else full.partition(".")[0]
    family, _, tag = name.partition(".")
    if not timm.is_model(family):
        raise ModelError(f"timm has no model {family}{_nearest(family, list(dict.fromkeys([*timm.list_models(), *ALIASES])))}")
    known = [n for n in timm.list_pretrained(family) if n.partition(".")[0] == family]
    if tag and name not in known and not _has_tag(name):
        raise ModelError(f"timm has no weights {tag} of {family}{_nearest(name, known)}")
    if hub and not tag:
        try:
            config = timm.get_pretrained_cfg(name)
        except RuntimeError:
            config = None
        if config is not None and config.tag:
            return f"{config.architecture}.{config.tag}"
    return name


def _has_tag(name: str) -> bool:
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False) is not None
    except RuntimeError:
        return False


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 3, 0.5)
    return f"; near it are {', '.join(close)}" if close else "; timm.list_models() lists what there is"


def load(spec: ModelSpec, *, classes: int | None = None, image_size: int | None = None, seed: int = 0) -> Model:
    """Build a model with its weights, on the CPU, in evaluation mode.

    classes: give it this many (a head of another size is replaced by a new one, and that is noted); None: as many as its weights have.
    image_size: input size in pixels, before the spec's and the model's own. seed: of random weights and of a new head.
    """
    hub = spec.checkpoint is None and spec.pretrained
    name = resolve(spec.model, hub=hub)
    weights, written = _read(Path(spec.checkpoint)) if spec.checkpoint else (None, {})
    if written and architecture(written["model"]) != architecture(name):
        raise ModelError(
            f"{spec.checkpoint} holds a {written['model']}, not a {name}; pass it as {architecture(written['model'])}={spec.checkpoint}"
        )
    if written and "." not in spec.model:
        name = written["model"]  # with the tag that the weights started from, not timm's tag of today
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
            notes.append(f"{name} had a head of {found} classes; it starts with a new one of {classes}")
    module.eval()
    try:
        with torch.inference_mode():
            module(torch.zeros(1, 3, size, size))
    except Exception as error:  # patch sizes, windows and poolings object in many ways
        raise ModelError(f"{name} can't take {size} px ({shorten(str(error), 160, placeholder=' …')}); choose another image_size") from None
    return Model(
        module.to(memory_format=torch.channels_last),  # as the renderer's pixels lie; convolutions are faster so
        name,
        classes if classes is not None else found,
        size,
        tuple(spec.mean or written.get("mean") or config["mean"]),
        tuple(spec.std or written.get("std") or config["std"]),
        written.get("interpolation") or ("bilinear" if config.get("interpolation") == "bilinear" else "bicubic"),
        notes,
    )


def save_for_timm(model: Model, folder: Path, class_names: Sequence[str] | None, facts: dict) -> None:
    """Write config.json and model.safetensors as timm's hub has them: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` makes the model of
    them, with its own normalisation and this project's evaluation (shorter side size·256/224, central crop).

    The model is on the CPU, in evaluation mode, and its tensors lie as timm makes them (contiguous, not channels last). class_names: of its outputs
    in order, if they are known. facts: what config.json is to say besides, under METADATA. Raises ModelError unless timm makes the same model of it,
    its logits equal bit for bit.
    """
    described = copy.copy(model.module)
    architectural = ("architecture", "fixed_input_size", "min_input_size", "first_conv", "classifier")  # all else is of timm's weights
    described.pretrained_cfg = {key: value for key, value in model.module.pretrained_cfg.items() if key in architectural} | {
        "num_classes": model.classes,
        "input_size": (3, model.image_size, model.image_size),
        "pool_size": None,
        "interpolation": model.interpolation,
        "crop_pct": 224 / 256,
        "crop_mode": "center",
        "mean": model.mean,
        "std": model.std,
        "custom_load": False,
    }
    named = {"label_names": list(class_names)} if class_names else {}
    save_config_for_hf(described, str(folder / "config.json"), model_config={**named, METADATA: facts})
    # Tensors that are shared, as in coat, are written twice: timm asks for each by its name.
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.module.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    noise = torch.randint(0, 256, (2, model.image_size, model.image_size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            x = model.normalise(noise)
            theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            why = "" if torch.equal(theirs(x), model.module(x)) else "its outputs differ"
    except Exception as error:  # timm raises whatever it likes
        why = shorten(str(error), 160, placeholder=" …")
    if why:
        raise ModelError(f"timm {timm.__version__} doesn't make {model.name} again of what it saved ({why}); use the checkpoint as it is")


@contextmanager
def attention_by_steps(model: Model) -> Iterator[None]:
    """Meanwhile timm's attention layers multiply, take the softmax and multiply again, instead of calling torch's fused function, some uses of which
    can't be translated to ONNX."""
    fused = [part for part in model.module.modules() if getattr(part, "fused_attn", False)]
    try:
        for part in fused:
            part.fused_attn = False
        yield
    finally:
        for part in fused:
            part.fused_attn = True


def sync_batchnorm(model: Model) -> None:
    """Let the model's BatchNorm layers take mean and variance over the images of all processes; on GPUs."""
    model.module = timm.layers.convert_sync_batchnorm(model.module)


def load_teachers(specs: Sequence[ModelSpec], device: torch.device) -> list[Model]:
    """Teachers of one class count and of different weights, on the device. Raises ModelError otherwise."""
    if not specs:
        raise ModelError("there is no teacher; name some under teachers: in the config, or with --teacher MODEL[=CHECKPOINT]")
    teachers = []
    for spec in specs:
        if spec.checkpoint is None and not spec.pretrained:
            raise ModelError(f"teacher {spec.model} has no weights; give it a checkpoint, or drop pretrained: false")
        teachers.append(load(spec))
    counts = {t.classes for t in teachers}
    if len(counts) > 1:
        raise ModelError(
            "the teachers' classes differ: " + ", ".join(f"{t.name} has {t.classes}" for t in teachers) + "; their mean needs the same ones"
        )
    seen: dict[str, str] = {}
    for teacher in teachers:
        digest = teacher.digest()
        if digest in seen:
            raise ModelError(f"teachers {seen[digest]} and {teacher.name} have the same weights; an ensemble needs different models")
        seen[digest] = teacher.name
    return [t.to(device) for t in teachers]


def forward_flops(spec: ModelSpec) -> tuple[float, int]:
    """(floating-point operations of one image's forward pass, input size in pixels), counted by torch on a model without memory; no weights are needed."""
    name = resolve(spec.model)
    config = _config(name)
    size = spec.image_size or config["input_size"][-1]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _create(name, pretrained=False, **_size_option(config, size)).eval()(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops()), size


def mean_softmax(logits_tbc: Sequence[torch.Tensor]) -> torch.Tensor:
    """Eq. 1 of MEAL V2: per teacher logits [batch, classes] → float32 [batch, classes], the mean of the teachers' softmax."""
    return torch.stack([logits.float().softmax(dim=1) for logits in logits_tbc]).mean(dim=0)


@torch.inference_mode()
def ensemble(
    teachers: Sequence[Model], pixels: dict[int, torch.Tensor], precision: str, *, batch_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each teacher sees the crop at its own size, in its own normalisation.

    pixels: uint8 [n, size, size, 3] by size. batch_size: of a forward pass; otherwise all at once. A smaller rest is filled up with its last row,
    since the size of a batch decides the last bits of its outputs. Returns the mean of the teachers' softmax (Eq. 1) and of their logits,
    float32 [n, classes] each.
    """
    n = len(next(iter(pixels.values())))
    batch_size = batch_size or n
    parts = []
    for start in range(0, n, batch_size):
        rows = min(batch_size, n - start)
        logits = []
        for teacher in teachers:
            x = pixels[teacher.image_size][start : start + rows]
            if rows < batch_size:
                x = torch.cat([x, x[-1:].expand(batch_size - rows, -1, -1, -1)])
            logits.append(teacher(x, precision)[:rows])
        parts.append((mean_softmax(logits), torch.stack(logits).mean(dim=0)))
    means, mean_logits = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(mean_logits)


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
    """What timm must be told to build a model for another input size than its own."""
    return {"img_size": size} if size != config["input_size"][-1] and config.get("fixed_input_size") else {}


def _create(name: str, *, pretrained: bool, **options: int) -> nn.Module:
    for noisy in ("timm", "huggingface_hub"):  # a line per retry; the error below says it once
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm, huggingface_hub and the network raise whatever they like; the user's repair is the same
        text = shorten(str(error), 160, placeholder=" …")
        if pretrained:
            raise ModelError(
                f"the weights of {name} can't be fetched ({text}); check the network, pass {architecture(name)}=CHECKPOINT, or start a student with pretrained: false"
            ) from None
        raise ModelError(f"timm can't build {name} with {options} ({text}); choose another image size or model") from None


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict, what this tool wrote of the model or {}). Tensors only: nothing in the file is executed."""
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
    except Exception as error:  # a damaged or foreign file fails in many ways inside safetensors and torch
        raise ModelError(
            f"{path} holds no weights that can be read ({shorten(str(error), 160, placeholder=' …')}); pass a .safetensors, .pth or .pt file"
        ) from None


def _head_size(weights: dict[str, torch.Tensor], config: dict, path: str) -> int:
    heads = config.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        for suffix in (".weight", ".bias"):
            if head + suffix in weights:
                return weights[head + suffix].shape[0]
    raise ModelError(f"{path} has no classifier {heads!r}, so it is no whole {config['architecture']}; {_repair(weights, path)}")


def _repair(weights: dict[str, torch.Tensor], path: str | None) -> str:
    """What to do with weights that don't fit: name their model, if it is one of the paper's."""
    fitting = []
    for candidate in dict.fromkeys(architecture(name) for name in ALIASES.values()):
        with torch.device("meta"):
            own = timm.create_model(candidate).state_dict()
        counters = {k for k in own if k.endswith("num_batches_tracked")}
        if own.keys() - counters == weights.keys() - counters and all(own[k].shape[1:] == w.shape[1:] for k, w in weights.items()):
            fitting.append(f"{candidate}={path}")
    return f"its tensors are those of a model of the paper: pass {' or '.join(fitting)}" if fitting else "name its model before the ="


def _fit(module: nn.Module, weights: dict[str, torch.Tensor], path: str | None, name: str) -> None:
    own = module.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    wrong = sorted(own.keys() - weights.keys() - optional) + sorted(weights.keys() - own.keys())
    wrong += sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)
    if wrong:
        raise ModelError(
            f"{path} doesn't fit {name}: {len(wrong)} of {len(own)} tensors are missing, foreign or of another shape, the first is {wrong[0]}; "
            f"{_repair(weights, path)}"
        )
    module.load_state_dict(weights, strict=False)
