"""Stage two: train a student from stored labels, from live teachers (online), or with hard labels: one loop for all."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path

import torch

from cache.format.manifest import USABLE, Images
from cache.system import durable
from cache.system.claims import claim, claims_of
from pipeline.config import Config, ConfigError
from pipeline.evaluation import Validation
from pipeline.images import folders
from pipeline.images.folders import DataError, is_split, split_folder
from pipeline.images.scan import scan_for
from pipeline.images.scan_cache import Scanned
from pipeline.models.weights import load
from pipeline.runs.folder import SCANS, RunError
from pipeline.runtime.distributed import ALONE, Processes
from pipeline.runtime.precision import fixed_shapes, require_precision
from pipeline.runtime.profiling import TRAINING, Clock, advice_on_training, report
from pipeline.runtime.progress import say
from pipeline.training import resume
from pipeline.training.loop import Run
from pipeline.training.source import Source, choose_source


def find_validation(
    data: Path, other: Path | None, source: Source, config: Config, processes: Processes = ALONE, before: Scanned | None = None
) -> Validation | None:
    """DATA/val, or the folder that the user named; None if there is neither. before: what an earlier start found there."""
    folder = processes.together(lambda: _validation_folder(data, other))
    if not processes.first(lambda: folder is not None):
        say("no validation: the data has no val/, and no --val-data was given")
        return None
    return Validation(
        processes.together(lambda: _required(folder, data)), processes.first(lambda: _to_validate_on(folder, source, config, before))
    )


def _validation_folder(data: Path, other: Path | None) -> Path | None:
    if other is not None:
        if not other.is_dir():
            raise DataError(f"--val-data {other} is no folder; it must hold class folders, or val/ with them")
        return split_folder(other, "val")
    return split_folder(data, "val") if is_split(data, "val") else None


def _required(folder: Path | None, data: Path) -> Path:
    if folder is None:
        raise DataError(f"{data} has no val/ here, and has one where the first process runs; put it on every machine")
    return folder


def _to_validate_on(folder: Path, source: Source, config: Config, before: Scanned | None) -> Images:
    found = scan_for(folder, source.class_names, config, source.policy.exif, before)
    if not (found.status == USABLE).any():
        raise DataError(f"{folder} holds no image to validate on")
    return found


def train(
    config: Config,
    data: Path,
    out: Path,
    *,
    store: Path | None = None,
    classes: list[str] | None = None,
    validation: Path | None = None,
    device: torch.device,
    allow_renderer_difference: bool = False,
    processes: Processes = ALONE,
    profile: bool = False,
) -> dict:
    """Train a student and leave it in ``out``; go on from the last finished epoch if ``out`` holds a part of this very run.

    store: the label store; needed for soft labels. classes: a class map, where there is no store. validation: another folder to validate on
    than ``data``/val. processes: those that train together, each with its part of every batch; the first one writes. profile: say at the end where the time went, and what to change.
    Returns the last epoch's metrics. Raises MealError for whatever the user can mend.
    """
    if config.student is None:
        raise ConfigError("student is missing; name one in the config, or with --student MODEL[=CHECKPOINT]")
    processes.together(lambda: _require_possible(config, processes, device))
    folder, out = folders.split_folder(data, "train"), out.absolute()
    if any(part.is_file() for part in (out, *out.parents)):
        raise RunError(f"{out} can't be a folder, since a part of it is a file; choose another --out")
    with claim(claims_of(out), "train") if processes.leads else nullcontext() as mine:
        processes.first(lambda: _require_alone(out, mine))
        scans = [Scanned(out / name) for name in SCANS]
        config, source, teachers = choose_source(
            config,
            folder,
            store,
            classes,
            device,
            started_views=processes.first(lambda: resume.views_of_run(out)),
            allow_renderer_difference=allow_renderer_difference,
            processes=processes,
            before=scans[0],
        )
        if len(source.images.usable) < 2:
            raise DataError(f"{folder} holds {len(source.images.usable)} usable images; training needs two or more")
        state = processes.first(lambda: resume.state_of_run(out, config, source))
        validated = find_validation(data, validation, source, config, processes, scans[1])
        student = processes.together(
            lambda: load(config.student, classes=len(source.class_names), image_size=config.train.image_size, seed=config.train.seed)
        )
        student.interpolation = source.policy.interpolation
        for line in [*student.introduction("student"), *_unusual(config, source)]:
            say(line)
        processes.first(lambda: _make_folder(out, config, scans))
        run = processes.together(
            lambda: Run(
                config, out, student.to(device), teachers, source, folder, validated, device, processes, Clock(device, exact=profile)
            )
        )
        run.learner = processes.joined(run.learner)
        with closing(run.replay), fixed_shapes():
            if state is not None:
                run.restore(state)
            if run.epoch >= config.train.epochs:
                say(f"{out} has its {run.epoch} epochs already; a larger --epochs goes on")
            while run.epoch < config.train.epochs:
                run.train_pass()
            if profile:
                for line in report(run.clock, TRAINING, advice_on_training(run.clock, config, device)):
                    say(line)
            return run.metrics[-1]


def _require_possible(config: Config, processes: Processes, device: torch.device) -> None:
    least = 2 * processes.world * config.train.crops_per_image
    if processes.world > 1 and config.train.batch_size < least:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is fewer than two images for each of {processes.world} processes; "
            f"set it to {least} or more, or start fewer"
        )
    if config.train.sync_bn and device.type != "cuda":
        raise ConfigError("train.sync_bn is for GPUs, and this runs on a CPU; set train.sync_bn=false")
    require_precision(config.train.precision, device, "train.precision")
    if config.train.online:
        require_precision(config.store.precision, device, "store.precision")


def _require_alone(out: Path, mine: set[str]) -> None:
    if not mine:
        raise RunError(f"another process is training in {out}; wait for it, or choose another --out")


def _make_folder(out: Path, config: Config, scans: list[Scanned]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for scan in scans:
        scan.keep()
    durable.write(out / "config.yaml", lambda scratch: scratch.write_text(config.to_yaml()))


def _unusual(config: Config, source: Source) -> list[str]:
    """What a user should know of the labels, where they aren't simply a store's."""
    lines = []
    if config.train.online:
        lines.append(f"online: {len(config.teachers)} teachers label every batch; no store is read or made")
    if source.policy.cutmix:
        seen = "the class folders, mixed by area" if config.train.labels == "hard" else "as the teachers saw it"
        lines.append(f"CutMix, its label {seen}")
    if config.train.cutmix:
        lines.append(f"CutMix of neighbours in a batch, labelled {'by live teachers' if config.train.online else 'by area'}")
    if config.train.crops_per_image > 1:
        lines.append(f"{config.train.crops_per_image} crops of each decoded image: a pass over the images counts as that many epochs")
        if source.policy.cutmix:
            lines.append(
                "every crop's CutMix partner is another image, which is decoded too: crops_per_image saves nothing with this store"
            )
    return lines
