"""Run both stages on real images that ship with scikit-learn: teachers, labels, a
student trained from soft labels, and the same student trained from hard labels."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_digits

from cache.format.manifest import Images
from pipeline.config import Config, ModelSpec
from pipeline.evaluation import EvaluationSettings, evaluate
from pipeline.images.data_set import DataSet
from pipeline.images.scan import scan
from pipeline.inspection.store_facts import store_facts
from pipeline.labelling.generate import generate
from pipeline.models.weights import load
from pipeline.render.settings import RenderSettings
from pipeline.runtime.execution import Execution
from pipeline.runtime.progress import duration, results, say
from pipeline.training.train import train

TRAINING_IMAGES = 1297  # the first images; the other 500 are for validation


def write_digits(folder: Path) -> None:
    """Write the 1,797 handwritten digits as 8 × 8 PNG files.

    folder/train and folder/val hold a folder per digit. The folder is written whole or
    not at all; a folder that exists is left as it is.
    """
    if folder.exists():
        return
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = scratch / ("train" if i < TRAINING_IMAGES else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(place / f"{i:04d}.png")
    try:
        scratch.rename(folder)
    except OSError:  # another demo was quicker
        shutil.rmtree(scratch)


def demo(config: Config, out: Path, device: torch.device, *, quiet: bool = False) -> dict:
    """Run the demo in ``out``, print its closing table unless ``quiet``, and return the
    table's figures. A step whose result ``out`` holds already is not run again."""
    started = time.monotonic()
    data, store = out / "digits", out / "labels.zarr"
    out.mkdir(parents=True, exist_ok=True)
    write_digits(data)
    seconds: dict[str, float] = {}

    def trained(name: str, labels: str, student: ModelSpec, stored: Path | None) -> ModelSpec:
        say(f"— {name}")
        begun = time.monotonic()
        recipe = config.model_copy(
            update={
                "student": student,
                "train": config.train.model_copy(
                    update={"labels": labels}
                    | ({"discriminator": None} if labels == "hard" else {})
                ),
            }
        )
        run = out / name.replace(" ", "-")
        train(recipe, DataSet.find(data, "train"), run, store=stored, execution=Execution(device))
        seconds[name] = time.monotonic() - begun
        return ModelSpec(model=student.model, checkpoint=str(run / "last.safetensors"))

    names = [f"teacher {t.model}" for t in config.teachers]
    scratch = [
        ModelSpec(model=t.model, image_size=t.image_size, pretrained=False) for t in config.teachers
    ]
    teachers = [
        trained(name, "hard", spec, None) for name, spec in zip(names, scratch, strict=True)
    ]
    say("— soft labels")
    begun = time.monotonic()
    generate(
        config.model_copy(update={"teachers": tuple(teachers)}),
        DataSet.find(data, "train"),
        store,
        Execution(device),
    )
    seconds["soft labels"] = time.monotonic() - begun
    soft = trained("student from soft labels", "soft", config.student, store)
    hard = trained("student from hard labels", "hard", config.student, store)

    val = DataSet.find(data, "val")
    found = scan(val, RenderSettings())
    ensemble = [load(spec).to(device) for spec in teachers]
    pupils = [load(spec).to(device) for spec in (soft, hard)]
    settings, execution = EvaluationSettings(batch_size=256), Execution(device)
    taught = evaluate(ensemble, val, found, settings=settings, execution=execution)
    learned = evaluate(
        pupils, val, found, teachers=ensemble, settings=settings, execution=execution
    )
    facts = store_facts(store)
    rows = dict(zip(names, taught.models, strict=True)) | {"ensemble": taught.ensemble}
    students = ("student from soft labels", "student from hard labels")
    rows |= dict(zip(students, learned.models, strict=True))
    result = {
        "rows": [
            {**score.document(), "name": name, "seconds": seconds.get(name)}
            for name, score in rows.items()
        ],
        "label_seconds": seconds["soft labels"],
        "labelled_crops": facts.labelled_crops,
        "label_bytes_per_crop": facts.label_bytes_per_crop,
        "seconds": time.monotonic() - started,
    }
    if not quiet:
        _print(result, out, found)
    return result


def _print(result: dict, out: Path, found: Images) -> None:
    table = Table(
        title=f"Handwritten digits, {len(found):,} validation images",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for name in ("top-1 %", "KL to teachers", "agreement %", "time"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        compared = (
            [f"{row['teacher_kl']:.4f}", f"{row['teacher_agreement']:.2f}"]
            if "teacher_kl" in row
            else ["", ""]
        )
        table.add_row(
            row["name"],
            f"{row['top1']:.2f}",
            *compared,
            duration(row["seconds"]) if row["seconds"] else "",
        )
    share = result["rows"][-1]["top1"] / 100
    error = 100 * (share * (1 - share) / len(found)) ** 0.5
    console = results()
    console.print(table)
    console.print(
        f"{result['labelled_crops']:,} crops labelled once, in "
        f"{duration(result['label_seconds'])}; {result['label_bytes_per_crop']:.1f} bytes per "
        f"crop; {duration(result['seconds'])} in all. One run: the standard error of each top-1 "
        f"is about {error:.1f}. Look at the store: python cli.py inspect {out / 'labels.zarr'}"
    )
