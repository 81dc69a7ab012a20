"""Evaluate models: exact single-crop top-1 and top-5 of each model and of their
ensemble, and each model's distance from a teacher ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch

from cache.errors import MealError
from cache.format.manifest import Images
from pipeline.config import ModelSpec
from pipeline.images.class_names import map_classes
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.images.reader import LOOK_AGAIN, Reader, naming
from pipeline.images.scan import scan, unusable_summary
from pipeline.models.classes import known_classes
from pipeline.models.model import Model, mean_softmax
from pipeline.models.weights import load
from pipeline.render.renderer import CentreRenderer
from pipeline.render.settings import RenderSettings
from pipeline.runtime.device_transfer import Sender, Sent
from pipeline.runtime.distributed import Processes
from pipeline.runtime.execution import Execution
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import ahead
from pipeline.runtime.waiting import giving_way


@dataclass
class Figures:
    """Hits and losses of one model, or of the ensemble, summed over images."""

    name: str
    images: int = 0
    classed: int = 0  # images whose class is told
    top1_hits: int = 0
    top5_hits: int = 0
    loss: float = 0.0  # sum of the cross-entropy against the class folders, nats
    teacher_kl: float = 0.0  # sum of KL(teachers‖model), nats
    teacher_hits: int = 0  # images for which model and teachers have the same top-1 class

    def add(
        self, probabilities: torch.Tensor, target: torch.Tensor, teachers: torch.Tensor | None
    ) -> None:
        """Add a batch to the sums.

        probabilities: float [n, classes]. target: int64 [n], class indices, or -1.
        teachers: float [n, classes], the mean of the teachers' softmax; None if there
        are none.
        """
        best = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
        told = target >= 0
        hit = best == target[:, None]
        self.images += len(target)
        self.classed += int(told.sum())
        self.top1_hits += int(hit[:, 0].sum())
        self.top5_hits += int(hit.sum())
        log = probabilities.log().clamp_min(-100)  # float32 may round a probability to zero
        self.loss -= float(log.gather(1, target.clamp_min(0)[:, None])[told].sum())
        if teachers is not None:
            self.teacher_kl += float((torch.xlogy(teachers, teachers) - teachers * log).sum())
            self.teacher_hits += int((best[:, 0] == teachers.argmax(dim=1)).sum())

    def add_up(self, processes: Processes) -> None:
        """Replace this process's sums by the sums over all processes."""
        names = [field.name for field in fields(self) if field.name != "name"]
        counts = processes.sum(
            torch.tensor([getattr(self, name) for name in names], dtype=torch.float64)
        )
        for name, count in zip(names, counts.tolist(), strict=True):
            setattr(self, name, type(getattr(self, name))(count))

    def score(self, *, compared: bool = False) -> Score:
        """Return percentages and means per image. compared: with the teachers too."""
        n = max(1, self.images)
        return Score(
            self.name,
            top1=100 * self.top1_hits / self.classed if self.classed else None,
            top5=100 * self.top5_hits / self.classed if self.classed else None,
            loss=self.loss / self.classed if self.classed else None,
            teacher_kl=self.teacher_kl / n if compared else None,
            teacher_agreement=100 * self.teacher_hits / n if compared else None,
        )


@dataclass(frozen=True)
class Score:
    """What a model, or an ensemble, reached.

    top1, top5: % of the images whose class is told; None if there are none. loss: mean
    cross-entropy against the class folders, nats. teacher_kl: mean KL(teachers‖model),
    nats. teacher_agreement: % of the images for which model and teachers have the same
    top-1 class. Both are None without teachers. checkpoint: the file that the user
    named, if there was one.
    """

    name: str
    top1: float | None
    top5: float | None
    loss: float | None
    teacher_kl: float | None = None
    teacher_agreement: float | None = None
    checkpoint: str | None = None

    def document(self) -> dict:
        """Return the figures that there are."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """Scores of each model, of their ensemble if there are several, and of the teachers
    if there are any; and how many images count, or don't, being unusable."""

    images: int
    unusable: int
    models: list[Score]
    ensemble: Score | None = None
    teachers: Score | None = None

    def document(self) -> dict:
        """Return what --json prints of the evaluation: the figures that there are."""
        several = {"ensemble": self.ensemble, "teachers": self.teachers}
        return {
            "images": self.images,
            "unusable": self.unusable,
            "models": [{**one.document(), "checkpoint": one.checkpoint} for one in self.models],
            **{name: score.document() for name, score in several.items() if score},
        }


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    rendering: settings of the renderer, except that each model has its own
    interpolation. batch_size: images per forward pass. precision: of the forward
    passes. what: text beside the progress.
    """

    rendering: RenderSettings = field(default_factory=RenderSettings)
    batch_size: int = 64
    precision: str = "float32"
    what: str = "evaluating"


def evaluate(
    models: Sequence[Model],
    data: DataSet,
    images: Images,
    *,
    teachers: Sequence[Model] = (),
    settings: EvaluationSettings = EvaluationSettings(),
    execution: Execution | None = None,
) -> Evaluation:
    """Evaluate each model, their ensemble if there are several, and the teachers if
    there are any.

    models, teachers: on the device and in evaluation mode. Each sees the central square
    at its own input size, with its own interpolation and normalisation. images: the
    manifest of ``data``; each usable image counts once. execution: each of its
    processes evaluates a part of the images, and all processes get the figures of all
    images. Returns a dict of numbers and names. Raises MealError if a model has another
    number of classes than ``data``.
    """
    execution = execution or Execution()
    processes, batch_size, precision = execution.processes, settings.batch_size, settings.precision
    for model in (*models, *teachers):
        if model.classes != len(data.class_names):
            raise MealError(
                f"{model.name} has {model.classes} classes, {data.path} has "
                f"{len(data.class_names)}; pass the --class-map that names the model's classes"
            )
    rows = images.usable
    cuts = [
        rows[start : start + batch_size]
        for start in range(processes.rank * batch_size, len(rows), processes.world * batch_size)
    ]
    figures = [Figures(model.name) for model in models]
    together = Figures("ensemble") if len(models) > 1 else None
    taught = Figures("teachers") if teachers else None
    look = {id(model): (model.image_size, model.interpolation) for model in (*models, *teachers)}
    send = Sender(execution.device)
    renderer = CentreRenderer(
        list(look.values()), batch_size, settings.rendering, pinned=execution.on_gpu
    )
    reader = Reader(data, images, settings.rendering.threads, LOOK_AGAIN)
    with (
        Progress(settings.what, sum(map(len, cuts)), "images") as progress,
        reader as read,
        renderer,
        torch.inference_mode(),
        giving_way(execution.device),
    ):

        def rendered() -> Iterator[tuple[np.ndarray, Sent[tuple]]]:
            with send.beside():
                for cut in cuts:
                    with naming(images, cut):
                        views = renderer(read(cut), images.height[cut], images.width[cut])
                    yield (
                        cut,
                        send((views, torch.from_numpy(images.class_index[cut].astype(np.int64)))),
                    )

        with ahead(rendered()) as batches:
            for cut, sent in batches:
                views, target = sent.received()
                reference = (
                    mean_softmax([t(views[look[id(t)]], precision) for t in teachers])
                    if teachers
                    else None
                )
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
    return Evaluation(
        images=len(rows),
        unusable=len(images) - len(rows),
        models=[one.score(compared=bool(teachers)) for one in figures],
        ensemble=together.score(compared=bool(teachers)) if together else None,
        teachers=taught.score() if taught else None,
    )


def evaluate_checkpoints(
    data: DataSet,
    models: Sequence[ModelSpec],
    *,
    teachers: Sequence[ModelSpec] = (),
    interpolation: str | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
    execution: Execution | None = None,
) -> Evaluation:
    """Load models, scan a folder for its images, and evaluate (``evaluate``).

    Class folders are matched by name with the classes that the models know.
    interpolation: of the resize, for every model; None: each model's own.
    """
    execution = execution or Execution()
    pupils, references = (
        [load(spec).to(execution.device) for spec in specs] for specs in (models, teachers)
    )
    for model in (*pupils, *references):
        model.interpolation = interpolation or model.interpolation
        for line in model.notes:
            say(line)
    owner = pupils[0].name if len(pupils) == 1 else "the models"
    known = known_classes([*pupils, *references])
    data = map_classes(data, known, owner, pupils[0].classes)
    if not data.told().names:
        if not references:
            raise DataError(
                f"nothing tells the classes of {data.path}, so there is no top-1 to count; name "
                f"teachers to compare with (--teacher), or pass images whose classes are told"
            )
        say(f"nothing tells the classes of {data.path}: no top-1, but the distance from teachers")
    found = scan(data, settings.rendering)
    for line in unusable_summary(found):
        say(line)
    result = evaluate(
        pupils, data, found, teachers=references, settings=settings, execution=execution
    )
    named = [
        replace(score, checkpoint=spec.checkpoint)
        for score, spec in zip(result.models, models, strict=True)
    ]
    return replace(result, models=named)


@dataclass
class Validation:
    """The images that a student is validated on. images: the manifest of ``data``."""

    data: DataSet
    images: Images
