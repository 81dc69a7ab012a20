"""Write a run's files so that a kill at any moment leaves the old file or the new file,
never half a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from cache.system.durable import write
from pipeline.models.model import METADATA, Model
from pipeline.runtime.failures import refusal_of
from pipeline.sampling.centre import CROP_PCT


def save_model(path: Path, model: Model, facts: dict) -> None:
    """Save a student as safetensors under timm's own tensor names.

    The header says how to use the student, in timm's words, and by ``facts`` how the
    student was trained. ``timm.create_model(MODEL, num_classes=…,
    checkpoint_path=PATH)`` (and ``img_size=`` for a ViT of another size) loads the
    file; so does MODEL=PATH everywhere in this tool. What timm's own config says of the
    model's input may differ from the header. The header has one key, since safetensors
    writes several keys in a random order, and equal weights should make equal files.
    """
    described = {
        "model": model.name,
        "classes": model.classes,
        "image_size": model.image_size,
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": model.interpolation,
        "crop_pct": CROP_PCT,
        **facts,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.module.state_dict().items()
    }
    write(
        path,
        lambda scratch: _written(
            save_file, tensors, scratch, metadata={METADATA: json.dumps(described)}
        ),
    )


def save_state(path: Path, state: dict) -> None:
    """Save everything that a run needs to resume: tensors, numbers and strings only."""
    write(path, lambda scratch: _written(torch.save, state, scratch))


def _written(save: Callable, *given: object, **named: object) -> None:
    """Call a library's function that writes a file. Raises OSError, as Python's own
    functions do, where the system refuses to write."""
    try:
        save(*given, **named)
    except Exception as error:
        if refused := refusal_of(error):
            raise refused from None
        raise
