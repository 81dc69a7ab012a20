"""Write the model card of an exported student."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cache import LabelStore
from cache.errors import printable
from pipeline import config_file
from pipeline.exchange.templates import filled
from pipeline.exchange.trained import Trained
from pipeline.models.model import Model


def card(
    title: str, trained: Trained, model: Model, store: LabelStore | None, onnx: dict | None
) -> str:
    """Return the model card, Markdown with a head in YAML. The card says only what the
    run, the store and this export tell."""
    soft, train = trained.facts["labels"] == "soft", trained.config.train
    student = trained.config.student
    tags = [
        "image-classification",
        "timm",
        *(["knowledge-distillation"] if soft else []),
        *(["meal-v2"] if soft and not trained.imported else []),
        *(["onnx"] if onnx else []),
    ]
    head = {"library_name": "timm", "pipeline_tag": "image-classification", "tags": tags}
    timm_model: Any = model.module
    return filled(
        "model_card.md",
        head=yaml.safe_dump(head, sort_keys=False),
        title=printable(title),
        architecture=timm_model.pretrained_cfg["architecture"],
        trained=trained,
        facts=trained.facts,
        figures=trained.figures,
        config=trained.config,
        soft=soft,
        recipe=config_file.flat(train.model_dump(mode="json")),
        model=model,
        parameters=sum(p.numel() for p in model.module.parameters()) / 1e6,
        digest=model.digest(),
        start=Path(student.checkpoint).name if student.checkpoint else None,
        store=store,
        onnx=onnx,
        versions={name: version(name) for name in ("timm", "torch")},
    )
