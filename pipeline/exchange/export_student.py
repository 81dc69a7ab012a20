"""Export a trained student: a folder in the layout of timm's hub, the network for ONNX
Runtime, and a card that says how the student was made."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cache import LabelStore
from cache.errors import printable
from cache.system.claims import claim, claims_of
from cache.system.durable import whole_folder
from cache.system.local import require_local
from pipeline.config import ModelSpec
from pipeline.exchange.model_card import card
from pipeline.exchange.onnx import ONNX, require_onnx, write_onnx
from pipeline.exchange.trained import ExportError, read_run
from pipeline.models.timm_export import save_for_timm
from pipeline.models.weights import load
from pipeline.runs.folder import RunFolder


def export(
    run: Path, out: Path, *, weights: str = "best", onnx: bool = True, store: Path | None = None
) -> dict:
    """Make the folder ``out`` from a checkpoint of ``run``, whole or not at all.

    The folder holds config.json, model.safetensors, README.md and model.onnx. weights:
    one of ``pipeline.runs.folder.WEIGHTS``. onnx: whether to make model.onnx. store:
    the store that the run was trained from; the model card then tells more about the
    teachers. Returns the files and the figures of the export. Raises MealError if the
    run, the store or the place is unsuitable, if timm makes another model from the
    folder, or if ONNX Runtime's softmax is off by more than ``TOLERANCE``.
    """
    require_local(run, out)
    if onnx:
        require_onnx()
    target = Path(os.path.realpath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(
            f"{out} is {'not empty' if target.is_dir() else 'a file'}; choose another --out"
        )
    labels = LabelStore.open(store) if store else None
    trained = read_run(run, weights, labels)
    with torch.random.fork_rng(devices=[]), claim(claims_of(target), "export") as mine:
        if not mine:
            raise ExportError(
                f"another process is exporting to {out}; wait for it, or choose another --out"
            )
        model = load(ModelSpec(model=trained.facts["model"], checkpoint=str(trained.file)))
        if RunFolder(run).header(weights) != trained.facts:
            raise ExportError(
                f"{trained.file} was written anew while it was read, since its run goes on; run "
                f"this command again"
            )
        # timm makes models in this memory format, and the exporter to ONNX needs it.
        model.module.to(memory_format=torch.contiguous_format)
        with whole_folder(target) as scratch:
            save_for_timm(model, scratch, trained.class_names, trained.origin)
            measured = write_onnx(model, scratch / ONNX) if onnx else None
            (scratch / "README.md").write_text(
                card(target.name, trained, model, labels, measured), encoding="utf-8"
            )
    return {
        "folder": str(out),
        "run": str(run),
        "weights": trained.file.name,
        "model": trained.origin["model"],
        "digest": model.digest(),
        "classes": model.classes,
        "class_names": trained.class_names is not None,
        "image_size": model.image_size,
        "epoch": trained.facts["epoch"],
        "epochs_done": trained.epochs,
        "epochs": trained.config.train.epochs,
        "validation_images": trained.validated,
        **{
            key: trained.figures.get(key)
            for key in ("val_top1", "val_top5", "val_loss", "loss", "kl", "agreement")
        },
        "onnx": measured,
        "files": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
    }


def summary(result: dict) -> list[str]:
    """Return the result of ``export`` as lines to print."""
    top = "" if result["val_top1"] is None else f", top-1 {result['val_top1']:.2f} %"
    files, onnx = result["files"], result["onnx"]
    lines = [
        f"{result['folder']}: {result['model']}, {result['classes']:,} classes, "
        f"{result['image_size']} px, epoch {result['epoch'] + 1} of {result['epochs_done']} done "
        f"({result['weights']}){top}",
        f"  model.safetensors  {files['model.safetensors'] / 2**20:,.1f} MiB; "
        f'timm.create_model("local-dir:{result["folder"]}", '
        "pretrained=True) gives the same logits, bit for bit",
    ]
    if onnx:
        size = sum(size for name, size in files.items() if name.startswith(ONNX))
        lines.append(
            f"  {ONNX}         {size / 2**20:,.1f} MiB; on {onnx['images']} random inputs its "
            f"logits are within {onnx['logits']:.1e} of PyTorch's, its softmax within "
            f"{onnx['total_variation']:.1e} in total variation"
        )
    lines.append(
        "  README.md          the model card; choose a license in it before you publish it"
    )
    return [printable(line) for line in lines]
