"""Files of a run, written so that a kill at any moment leaves the old one or the new
one, never half of one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cache.system.durable import write
from pipeline.models.model import METADATA, Model


def save_model(path: Path, model: Model, facts: dict) -> None:
    """A student as safetensors under timm's own tensor names; the header says how to
    use it, and ``facts`` of how it came about.

    ``timm.create_model(MODEL, num_classes=…, checkpoint_path=PATH)`` loads it; so does
    MODEL=PATH everywhere in this tool. One key in the header: safetensors writes
    several in a random order, and equal weights should make equal files.
    """
    described = {
        "model": model.name,
        "classes": model.classes,
        "image_size": model.image_size,
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": model.interpolation,
        **facts,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.module.state_dict().items()
    }
    write(
        path,
        lambda scratch: save_file(tensors, scratch, metadata={METADATA: json.dumps(described)}),
    )


def save_state(path: Path, state: dict) -> None:
    """Everything that a run needs to go on: tensors, numbers and strings only."""
    write(path, lambda scratch: torch.save(state, scratch))
