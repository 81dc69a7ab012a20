"""Read a run's folder: its config, metrics and weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import numpy as np
import safetensors
import yaml

from cache import LabelStore
from cache.errors import MealError, StoreError
from pipeline import config_file
from pipeline.config import Config, ConfigError
from pipeline.config_file import validate
from pipeline.models.model import METADATA
from pipeline.models.names import public
from pipeline.runs.metrics import FIGURES


class RunError(MealError):
    """A run directory that can't be gone on with."""


SAID = ("model", "classes", "image_size", "labels", "source", "epoch")  # what train-student writes into the header of every checkpoint


class ExportError(MealError):
    """A run that can't be exported, or not to this place."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and what the run tells of it."""

    file: Path
    facts: dict  # the checkpoint's header
    config: Config
    passes: list[dict]  # metrics.jsonl
    figures: dict  # of those, the pass that the checkpoint is of
    validated: int | None  # images of the validation, if the run tells
    class_names: list[str] | None  # of the outputs, in order
    teachers: list[str]  # timm names, without paths; empty if there were none, or if neither checkpoint nor store tells
    # The crop policy, as a store has it. None if the run had a store that wasn't given: of imported crops config.yaml has defaults.
    drawn: dict | None
    imported: dict | None  # what labels of others were imported from

    @property
    def origin(self) -> dict:
        """Where the weights come from, for config.json."""
        kept = {key: self.facts.get(key) for key in ("labels", "source", "epoch", "val_top1")}
        return {"model": public(self.facts["model"]), "weights": self.file.stem, "teachers": self.teachers, **kept}

    @property
    def epochs(self) -> int:
        """Done so far."""
        return self.passes[-1]["epoch"] + 1

    @property
    def images(self) -> int:
        """Crops that the student saw in all of them."""
        return sum(one["images"] for one in self.passes)

    @property
    def seconds(self) -> float:
        return sum(one["seconds"] for one in self.passes)


def read_run(run: Path, weights: str, store: LabelStore | None = None) -> Trained:
    """What a run directory holds. Raises ExportError, in one line, if that isn't all that a card needs, or doesn't belong together."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ExportError(
                f"{run} is no run of train-student with a finished epoch (it has no {name}); check the path, or finish an epoch"
            )
    file = run / f"{weights}.safetensors"
    facts, config, passes = _header(file), config_file.load(run / "config.yaml"), _passes(run / "metrics.jsonl")
    if config.student is None:
        raise ExportError(f"{run / 'config.yaml'} names no student, so it is not what train-student wrote; restore it from a copy")
    figures = next((one for one in passes if one["epoch"] == facts["epoch"]), None)
    if figures is None or figures.get("val_top1") != facts.get("val_top1", figures.get("val_top1")):
        raise ExportError(
            f"{file} is of epoch {facts['epoch'] + 1}, of which metrics.jsonl has {'other' if figures else 'no'} figures; "
            "run the same train-student command again to finish that epoch, and then this, or pass the other --weights"
        )
    if store is not None and store.identity.hex() != facts["source"]:
        raise StoreError(
            f"{store.path} (identity {store.identity.hex()[:12]}…) isn't what {run} was trained from ({facts['source'][:12]}…); "
            "pass that store, or leave --store out"
        )
    names = facts.get("class_names") or (store.class_names if store else None)  # checkpoints before 0.5 had none
    if names is not None and len(names) != facts["classes"]:
        raise ExportError(f"{file} has {facts['classes']} classes and names {len(names)}; restore it from a copy")
    teachers = facts.get("teachers") or []
    if store and facts["labels"] == "soft":
        teachers = [teacher["model"] for teacher in store.provenance["teachers"]]
    if store:
        drawn, imported = store.provenance["crops"], store.provenance.get("imported")
    else:
        without_store = config.train.online or (run / SCANS[0]).is_file()
        drawn, imported = config.crops.model_dump(mode="json") if without_store else None, facts.get("imported")
    return Trained(
        file, facts, config, passes, figures, _validated(run, figures), names, [public(name) for name in teachers], drawn, imported
    )


def _header(file: Path) -> dict:
    """What train-student says of a checkpoint in its header."""
    if not file.is_file():
        raise ExportError(f"there is no {file}; check the path, or run train-student again until an epoch is finished")
    try:
        with safetensors.safe_open(file, "pt") as f:
            facts = json.loads((f.metadata() or {}).get(METADATA, "{}"))
    except Exception as error:  # a damaged file fails in many ways
        raise ExportError(f"{file} is damaged ({shorten(str(error), 120, placeholder=' …')}); restore it from a copy") from None
    if missing := [key for key in SAID if facts.get(key) is None]:
        raise ExportError(f"{file} was not written by train-student (its header doesn't say its {missing[0]}); pass a run of train-student")
    return facts


def _passes(file: Path) -> list[dict]:
    try:
        passes = [json.loads(line) for line in file.read_text().splitlines()]
        if not all({"epoch", "loss", "images", "seconds"} <= one.keys() for one in passes):
            raise ValueError("a line lacks its epoch, loss, images or seconds")
    except (ValueError, AttributeError) as error:
        raise ExportError(f"{file} is damaged ({shorten(str(error), 120, placeholder=' …')}); restore it from a copy") from None
    return passes


def _validated(run: Path, figures: dict) -> int | None:
    """How many images were validated on, as the run's last start found them; None if none were, or if the figures can't be of so many."""
    if "val_top1" not in figures:
        return None
    try:
        with np.load(run / SCANS[1], allow_pickle=False) as kept:
            images = len(kept["bytes"])
    except Exception:  # there is none, as before 0.4, or a damaged one, which can raise anything
        return None
    hits = images * figures["val_top1"] / 100
    return images if images and abs(hits - round(hits)) < 1e-6 else None


SCANS = ("training-images.npz", "validation-images.npz")  # files of a run: what was found in the two folders


def started_config(out: Path) -> Config:
    """The config that a run was started with; what it says nothing of, since its program was older, has its default."""
    try:
        return validate(yaml.safe_load((out / "config.yaml").read_text()), str(out / "config.yaml"))
    except (OSError, yaml.YAMLError, ConfigError) as error:
        raise RunError(f"{out / 'config.yaml'} can't be used to go on ({error}); choose another --out") from None


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def config_of(folder: Path) -> Config:
    """Of a run of an older program too: what it says nothing of has its default."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunError(f"{folder} is no run directory, since it has no config.yaml; name a folder that train-student --out made")
    try:
        return validate(yaml.safe_load(file.read_text()), "not a recipe")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        raise RunError(f"{file} is damaged ({' '.join(str(error).split())}); leave this run out, or bring the file back") from None


def metrics_of(file: Path) -> list[dict]:
    if not file.is_file():
        raise RunError(f"{file.parent} has no finished epoch yet; wait for it, or leave this run out")
    metrics: list[dict] = []
    try:
        for number, text in enumerate(file.read_text().splitlines(), 1):
            metrics.append(json.loads(text))
            if trouble := _trouble(metrics):
                raise ValueError(f"line {number} {trouble}")
    except (OSError, ValueError, OverflowError) as error:  # what isn't UTF-8 or JSON is a ValueError too
        raise RunError(f"{file} is damaged ({error}); leave this run out, or bring the file back") from None
    if not metrics:
        raise RunError(f"{file} is empty; leave this run out, or bring the file back")
    return metrics


def _trouble(metrics: list) -> str:
    """Why the last of these can't be a pass after the others; empty if it can."""
    newest = metrics[-1]
    if not isinstance(newest, dict):
        return "is no JSON object"
    for key in ("epoch", "loss", "seconds", "images_per_second"):
        if newest.get(key) is None:
            return f"lacks {key}"
    for key in FIGURES | {"epoch", "seconds", "images"}:
        value = newest.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"has {key} {value!r}, which is no number"
        if not math.isfinite(value or 0) and key in ("images", "seconds", "images_per_second"):
            return f"has {key} {value}, which isn't finite"
    if not isinstance(newest["epoch"], int) or newest["epoch"] <= (metrics[-2]["epoch"] if metrics[:-1] else -1):
        return f"has epoch {newest['epoch']}, which doesn't go on from the one before"
    return ""
