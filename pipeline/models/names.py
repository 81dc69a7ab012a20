"""Translate names: the paper's models to timm's, and WordNet ids to readable
classes."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import timm
from timm.data import ImageNetInfo
from timm.models._registry import _deprecated_models

from pipeline.models.model import ModelError


def public(name: str) -> str:
    """Return a model's name without a path of this machine: local-dir:/path/to/FOLDER →
    local-dir:FOLDER."""
    source, colon, place = name.partition(":")
    return f"{source}:{Path(place).name}" if colon and source == "local-dir" else name


# Names of models in the paper, in its authors' code and in the timm of 2020 that the
# code used (0.2.1) → today's timm names of the same weights. Some of the old names mean
# other weights in today's timm: resnet50 is a1_in1k, and tf_efficientnet_b4 is the
# Noisy Student, which would make the paper's pair of EfficientNets one model twice. In
# 2020 efficientnet_b4 had no weights, so the paper's is tf_efficientnet_b4.
# Today's weights of efficientnet_b4 are reached by their tag.
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
    # timm builds 32x8d for these two names, without a warning.
    "ig_resnext101_32x16d": "resnext101_32x16d.fb_wsl_ig1b_ft_in1k",
    "ig_resnext101_32x32d": "resnext101_32x32d.fb_wsl_ig1b_ft_in1k",
}
# Models that timm no longer has → the nearest model that it has.
GONE = dict.fromkeys(
    ("resnext101_32x48d", "ig_resnext101_32x48d", "resnext101_32x48d_wsl"),
    "resnext101_32x32d.fb_wsl_ig1b_ft_in1k",
)


def imagenet_classes() -> list[str]:
    """Return the WordNet ids of ImageNet's 1,000 classes, in the order of the models'
    outputs (the list that timm ships)."""
    return ImageNetInfo("imagenet-1k").label_names()


def class_titles(names: Sequence[str]) -> list[str]:
    """Return readable names of classes. A WordNet id becomes its first word (n01440764
    → tench), followed by the id if two classes have the same word. Any other name stays
    as it is."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in names):
        return list(names)
    told: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-1k"):
        info = ImageNetInfo(subset)
        told |= dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    titles = [told.get(name, name).partition(",")[0] for name in names]
    count = Counter(titles)
    return [
        title if count[title] == 1 else f"{title} ({name})"
        for title, name in zip(titles, names, strict=True)
    ]


def resolve(name: str, *, hub: bool = True) -> str:
    """Return a timm name with the tag of its weights: ``resnet50`` →
    ``resnet50.ram_in1k`` (ALIASES), ``resnet34`` → ``resnet34.a1_in1k`` (timm's
    choice).

    hub: True if timm's own weights are meant. If not, a name without a tag means the
    architecture alone, and stays without a tag. Raises ModelError with the nearest name
    if timm has no such model.
    """
    if ":" in name:  # hf-hub:… and local-dir:…, which timm resolves itself
        return name
    if name in GONE:
        raise ModelError(f"timm has no {name} any more; the nearest is {GONE[name]}")
    if full := ALIASES.get(name) or _deprecated_models.get(name):
        name = full if hub else full.partition(".")[0]
    family, _, tag = name.partition(".")
    if not timm.is_model(family):
        raise ModelError(
            "timm has no model "
            f"{family}{_nearest(family, list(dict.fromkeys([*timm.list_models(), *ALIASES])))}"
        )
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
    return (
        f"; near it are {', '.join(close)}" if close else "; timm.list_models() lists what there is"
    )
