"""Exact single-crop top-1 and top-5 of models and of their ensemble, and how close a model is to a teacher ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from cache.errors import MealError
from cache.format.manifest import Images
from pipeline.images.reader import Reader, naming
from pipeline.models.model import Model, mean_softmax
from pipeline.render.dali import CentreRenderer
from pipeline.runtime.device_transfer import Sender, Sent
from pipeline.runtime.distributed import ALONE, Processes
from pipeline.runtime.progress import Progress
from pipeline.runtime.threads import ahead


@dataclass
class Figures:
    """Counts of one model, or of the ensemble, over all images."""

    name: str
    images: int = 0
    top1_hits: int = 0
    top5_hits: int = 0
    loss: float = 0.0  # sum of the cross-entropy against the class folders, nats
    teacher_kl: float = 0.0  # sum of KL(teachers‖model), nats
    teacher_hits: int = 0  # images where model and teachers put the same class first

    def add(self, probabilities: torch.Tensor, target: torch.Tensor, teachers: torch.Tensor | None) -> None:
        """float [n, classes] probabilities, int64 [n] class indices, float [n, classes] mean softmax of the teachers."""
        best = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
        hit = best == target[:, None]
        self.images += len(target)
        self.top1_hits += int(hit[:, 0].sum())
        self.top5_hits += int(hit.sum())
        log = probabilities.log().clamp_min(-100)  # a probability that float32 rounds to zero
        self.loss -= float(log.gather(1, target[:, None]).sum())
        if teachers is not None:
            self.teacher_kl += float((torch.xlogy(teachers, teachers) - teachers * log).sum())
            self.teacher_hits += int((best[:, 0] == teachers.argmax(dim=1)).sum())

    def add_up(self, processes: Processes) -> None:
        """Over what all processes counted."""
        names = [field.name for field in fields(self) if field.name != "name"]
        counts = processes.sum(torch.tensor([getattr(self, name) for name in names], dtype=torch.float64))
        for name, count in zip(names, counts.tolist(), strict=True):
            setattr(self, name, type(getattr(self, name))(count))

    def report(self, compared: bool) -> dict:
        """Percentages and means, as --json prints them."""
        n = max(1, self.images)
        figures = {"name": self.name, "top1": 100 * self.top1_hits / n, "top5": 100 * self.top5_hits / n, "loss": self.loss / n}
        if compared:
            figures |= {"teacher_kl": self.teacher_kl / n, "teacher_agreement": 100 * self.teacher_hits / n}
        return figures


def evaluate(
    models: Sequence[Model],
    folder: Path,
    images: Images,
    classes: int,
    *,
    device: torch.device,
    teachers: Sequence[Model] = (),
    batch_size: int = 64,
    exif: str = "ignore",
    backend: str = "cpu",
    threads: int | None = None,
    what: str = "evaluating",
    processes: Processes = ALONE,
    precision: str = "float32",
) -> dict:
    """Figures of each model, of their ensemble if there are several, and of the teachers if there are any.

    images: a manifest of ``folder``, whose class indices go up to ``classes``; its usable images count, each once. Each model sees the central square at its own input size, in its own
    interpolation and normalisation. Models must be on the device and in evaluation mode. processes: each takes a part of the images, and all get the figures of all. precision: of the models' forward passes. Returns a dict of numbers and names.
    """
    for model in (*models, *teachers):
        if model.classes != classes:
            raise MealError(
                f"{model.name} has {model.classes} classes, {folder} has {classes}; pass the --class-map that names the model's classes"
            )
    rows = images.usable
    cuts = [rows[start : start + batch_size] for start in range(processes.rank * batch_size, len(rows), processes.world * batch_size)]
    figures = [Figures(model.name) for model in models]
    together = Figures("ensemble") if len(models) > 1 else None
    taught = Figures("teachers") if teachers else None
    look = {id(model): (model.image_size, model.interpolation) for model in (*models, *teachers)}
    send = Sender(device)
    renderer = CentreRenderer(list(look.values()), batch_size, exif=exif, backend=backend, threads=threads, pinned=device.type == "cuda")
    with Progress(what, sum(map(len, cuts)), "images") as progress, Reader(folder, images, threads) as read, torch.inference_mode():

        def rendered() -> Iterator[tuple[np.ndarray, Sent[tuple]]]:
            with send.beside():
                for cut in cuts:
                    with naming(images, cut):
                        views = renderer(read(cut), images.height[cut], images.width[cut])
                    yield cut, send((views, torch.from_numpy(images.class_index[cut].astype(np.int64))))

        with ahead(rendered()) as batches:
            for cut, sent in batches:
                views, target = sent.received()
                reference = mean_softmax([t(views[look[id(t)]], precision) for t in teachers]) if teachers else None
                logits = [model(views[look[id(model)]], precision) for model in models]
                for entry, model_logits in zip(figures, logits, strict=True):
                    entry.add(model_logits.softmax(dim=1), target, reference)
                if together:
                    together.add(mean_softmax(logits), target, reference)
                if taught:
                    taught.add(reference, target, None)
                progress.advance(len(cut))
    for entry in (*figures, *(figure for figure in (together, taught) if figure)):
        entry.add_up(processes)
    compared = bool(teachers)
    result = {"images": len(rows), "unusable": len(images) - len(rows), "models": [f.report(compared) for f in figures]}
    if together:
        result["ensemble"] = together.report(compared)
    if taught:
        result["teachers"] = taught.report(False)
    return result


@dataclass
class Validation:
    folder: Path
    images: Images
