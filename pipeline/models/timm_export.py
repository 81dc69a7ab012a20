"""Save a student so that timm's hub code loads it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf

from pipeline.models.model import METADATA, Model, ModelError
from pipeline.sampling.centre import CROP_PCT


def save_for_timm(
    model: Model, folder: Path, class_names: Sequence[str] | None, facts: dict
) -> None:
    """Write config.json and model.safetensors in the format of timm's hub.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` then builds the model,
    with its own normalisation and this project's evaluation (shorter side size·256/224,
    central crop).

    model: on the CPU, in evaluation mode, with its tensors in timm's memory layout
    (contiguous, not channels last). class_names: of the outputs, in order, if they are
    known. facts: further content of config.json, under METADATA. Raises ModelError
    unless timm builds the same model, with logits that are equal bit for bit.
    """
    described: Any = copy.copy(model.module)
    # The other keys describe timm's weights, not the architecture.
    architectural = (
        "architecture",
        "fixed_input_size",
        "min_input_size",
        "first_conv",
        "classifier",
    )
    known: Any = model.module.pretrained_cfg
    described.pretrained_cfg = {
        key: value for key, value in known.items() if key in architectural
    } | {
        "num_classes": model.classes,
        "input_size": (3, model.image_size, model.image_size),
        "pool_size": None,
        "interpolation": model.interpolation,
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
        "mean": model.mean,
        "std": model.std,
        "custom_load": False,
    }
    named = {"label_names": list(class_names)} if class_names else {}
    save_config_for_hf(
        described, str(folder / "config.json"), model_config={**named, METADATA: facts}
    )
    # Shared tensors, as in coat, are written twice: timm reads each tensor by its name.
    tensors = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in model.module.state_dict().items()
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    noise = torch.randint(
        0,
        256,
        (2, model.image_size, model.image_size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    try:
        with torch.inference_mode():
            x = model.normalise(noise)
            theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            why = "" if torch.equal(theirs(x), model.module(x)) else "its outputs differ"
    except Exception as error:  # timm raises errors of many types
        why = shorten(str(error), 160, placeholder=" …")
    if why:
        raise ModelError(
            f"timm {timm.__version__} doesn't make {model.name} again of what it saved ({why}); "
            f"use the checkpoint as it is"
        )


@contextmanager
def attention_by_steps(model: Model) -> Iterator[None]:
    """Let timm's attention layers multiply, take the softmax and multiply again,
    instead of calling torch's fused function. Some uses of the fused function can't be
    translated to ONNX."""
    fused: list[Any] = [
        part for part in model.module.modules() if getattr(part, "fused_attn", False)
    ]
    try:
        for part in fused:
            part.fused_attn = False
        yield
    finally:
        for part in fused:
            part.fused_attn = True
