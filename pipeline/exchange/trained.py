"""Read a checkpoint of a run, with the facts that the run tells about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from pipeline.config import Config
from pipeline.models.names import public
from pipeline.runs.folder import SCANS, RunError, RunFolder
from pipeline.runs.metrics import images_of


class ExportError(RunError):
    """A run that can't be exported, or a place that it can't be exported to."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, with the facts that the run tells about it."""

    file: Path
    facts: dict  # the checkpoint's header
    config: Config
    passes: list[dict]  # metrics.jsonl
    figures: dict  # metrics of the pass that the checkpoint is from
    validated: int | None  # number of validation images, if the run tells
    class_names: list[str] | None  # in the order of the outputs
    # timm names, without paths; empty if there were no teachers, or if neither the
    # checkpoint nor the store names them
    teachers: list[str]
    # The crop policy as a store has it. None if the run had a store that isn't given:
    # for imported crops config.yaml has mere defaults.
    drawn: dict | None
    imported: dict | None  # provenance of imported labels; None for labels made here

    @property
    def origin(self) -> dict:
        """Return where the weights come from, for config.json."""
        kept = {key: self.facts.get(key) for key in ("labels", "source", "epoch", "val_top1")}
        return {
            "model": public(self.facts["model"]),
            "weights": self.file.stem,
            "teachers": self.teachers,
            **kept,
        }

    @property
    def epochs(self) -> int:
        """Return the number of epochs done so far."""
        return self.passes[-1]["epoch"] + 1

    @property
    def images(self) -> float:
        """Return how many crops the student saw in all epochs so far."""
        return sum(map(images_of, self.passes))

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far, without validation."""
        return sum(one["seconds"] for one in self.passes)


def read_run(run: Path, weights: str, store: LabelStore | None = None) -> Trained:
    """Read a checkpoint, one of ``pipeline.runs.folder.WEIGHTS``, and the folder of its
    run.

    Raises ExportError, in one line, if the folder lacks a fact that a model card needs,
    or if its files don't belong together. Raises StoreError if the run was not trained
    from ``store``.
    """
    folder = RunFolder(run)
    file, config = folder.checkpoint(weights), folder.config()
    if weights.endswith("ema") and config.train.ema_decay is None:
        raise ExportError(
            f"{run} kept no moving average of its weights (train.ema_decay); pass --weights best "
            f"or last"
        )
    passes, facts = folder.metrics(), folder.header(weights)
    if config.student is None:
        raise ExportError(
            f"{run / 'config.yaml'} names no student, so it is not what train-student wrote; "
            f"restore it from a copy"
        )
    figures = next((one for one in passes if one["epoch"] == facts["epoch"]), None)
    if figures and "ema_decay" in facts:
        own = {key: figures.get(f"{key}_ema") for key in ("val_top1", "val_top5", "val_loss")}
        figures = figures | {key: value for key, value in own.items() if value is not None}
    if figures is None or figures.get("val_top1") != facts.get("val_top1", figures.get("val_top1")):
        raise ExportError(
            f"{file} is of epoch {facts['epoch'] + 1}, of which metrics.jsonl has "
            f"{'other' if figures else 'no'} figures; run the same train-student command again to "
            "finish that epoch, and then this, or pass other --weights"
        )
    if store is not None and store.identity.hex() != facts["source"]:
        raise StoreError(
            f"{store.path} (identity {store.identity.hex()[:12]}…) isn't what {run} was trained "
            f"from ({facts['source'][:12]}…); pass that store, or leave --store out"
        )
    # Checkpoints before version 0.5 have no class names.
    names = facts.get("class_names") or (store.class_names if store else None)
    if names is not None and len(names) != facts["classes"]:
        raise ExportError(
            f"{file} has {facts['classes']} classes and names {len(names)}; restore it from a copy"
        )
    teachers = facts.get("teachers") or []
    if store and facts["labels"] == "soft":
        teachers = [teacher["model"] for teacher in store.provenance["teachers"]]
    if store:
        drawn, imported = store.provenance["crops"], store.provenance.get("imported")
    else:
        without_store = config.train.online or (run / SCANS[0]).is_file()
        drawn, imported = (
            config.crops.model_dump(mode="json") if without_store else None,
            facts.get("imported"),
        )
    return Trained(
        file,
        facts,
        config,
        passes,
        figures,
        _validated(run, figures),
        names,
        [public(name) for name in teachers],
        drawn,
        imported,
    )


def _validated(run: Path, figures: dict) -> int | None:
    """Return the number of validation images that the run's last start found. Returns
    None without validation, or if that number of images can't give the run's top-1."""
    if "val_top1" not in figures:
        return None
    try:
        with np.load(run / SCANS[1], allow_pickle=False) as kept:
            images = len(kept["bytes"])
    except Exception:  # a missing file, as before 0.4, or a damaged one
        return None
    hits = images * figures["val_top1"] / 100
    return images if images and abs(hits - round(hits)) < 1e-6 else None
