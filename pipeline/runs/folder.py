"""Read a run's folder: config, metrics, checkpoints and state. All readers of run
folders use this module."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import safetensors
import torch
import yaml

from cache.errors import MealError
from pipeline.config import Config, ConfigError
from pipeline.config_file import validate
from pipeline.models.model import METADATA
from pipeline.runs.metrics import FIGURES

CONFIG, METRICS, STATE = "config.yaml", "metrics.jsonl", "state.pt"
# Checkpoints: of the best and of the newest pass, and those of the moving average.
WEIGHTS = ("best", "last", "best_ema", "ema")
SCANS = ("training-images.npz", "validation-images.npz")  # scans of the image folders
# Facts that train-student writes into the header of every checkpoint.
SAID = ("model", "classes", "image_size", "labels", "source", "epoch")


# Of runs of versions that record none: who resizes their crops (before 0.10), the
# discriminator's variant (before 0.11), and the precision.
OLD_RESIZE, OLD_VARIANT, OLD_PRECISION = "dali", "unbounded", "float32"


class RunError(MealError):
    """A run that can't be read, trained or resumed."""


@dataclass(frozen=True)
class RunFolder:
    """Reads the folder of a run. The run may be of an older version, and may still be
    training.

    repair: the advice to the user where a file is missing or damaged. Every method that
    reads a file, except ``lines``, raises RunError there, in one line.
    """

    path: Path
    repair: str = "restore it from a copy"

    def config(self) -> Config:
        """Return the config that the run was started with. A key that an older version
        didn't write has its default, or what that version did."""
        file = self.path / CONFIG
        if not file.is_file():
            raise RunError(
                f"{self.path} is no run of train-student (it has no {CONFIG}); check the path, or "
                f"{self.repair}"
            )
        try:
            found = validate(yaml.safe_load(file.read_text("utf-8")), "not a recipe")
            found = found.with_resize(found.render.resize or OLD_RESIZE)
            return found.with_variant(OLD_VARIANT).with_precision(OLD_PRECISION)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
            raise RunError(
                f"{file} is damaged ({' '.join(str(error).split())}); {self.repair}"
            ) from None

    def metrics(self) -> list[dict]:
        """Return the figures of each pass over the images, in order, one pass at
        least."""
        file, metrics = self.path / METRICS, []
        if not file.is_file():
            raise RunError(
                f"{self.path} has no finished epoch (it has no {METRICS}); finish one, or "
                f"{self.repair}"
            )
        try:
            for number, text in enumerate(file.read_text("utf-8").splitlines(), 1):
                metrics.append(json.loads(text))
                if trouble := _trouble(metrics):
                    raise ValueError(f"line {number} {trouble}")
        except (OSError, ValueError, OverflowError) as error:  # ValueError: no UTF-8, or no JSON
            raise RunError(
                f"{file} is damaged ({shorten(str(error), 160, placeholder=' …')}); {self.repair}"
            ) from None
        if not metrics:
            raise RunError(f"{file} is empty; {self.repair}")
        return metrics

    def header(self, weights: str) -> dict:
        """Return the facts in the header of a checkpoint, one of ``WEIGHTS``, as
        train-student wrote them."""
        file = self.checkpoint(weights)
        if not file.is_file():
            raise RunError(
                f"there is no {file}; check the path, or run train-student again until an epoch is "
                f"finished"
            )
        try:
            with safetensors.safe_open(file, "pt") as f:
                facts = json.loads((f.metadata() or {}).get(METADATA, "{}"))
        except Exception as error:  # a damaged file fails in many ways
            raise RunError(
                f"{file} is damaged ({shorten(str(error), 120, placeholder=' …')}); {self.repair}"
            ) from None
        if missing := [key for key in SAID if facts.get(key) is None]:
            raise RunError(
                f"{file} was not written by train-student (its header doesn't say its "
                f"{missing[0]}); pass a run of train-student"
            )
        return facts

    def state(self) -> dict | None:
        """Return the state that the run resumes from, on the CPU; None if there is no
        state."""
        file = self.path / STATE
        if not file.exists():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, unpickling and I/O errors mean the same to a user
            why = shorten(str(error), 120, placeholder=" …")
            raise RunError(
                f"{file} is damaged ({why}); choose another --out, or delete that folder to start "
                f"again"
            ) from None

    def checkpoint(self, weights: str) -> Path:
        """Return the path of a checkpoint, one of ``WEIGHTS``."""
        return self.path / f"{weights}.safetensors"

    def lines(self) -> int:
        """Count the passes in metrics.jsonl without reading their figures; 0 without
        the file."""
        file = self.path / METRICS
        return len(file.read_text("utf-8").splitlines()) if file.exists() else 0


def _trouble(metrics: list) -> str:
    """Say why the last entry can't be a pass after the others; empty if it can."""
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
    if not isinstance(newest["epoch"], int) or newest["epoch"] <= (
        metrics[-2]["epoch"] if metrics[:-1] else -1
    ):
        return f"has epoch {newest['epoch']}, which doesn't go on from the one before"
    return ""
