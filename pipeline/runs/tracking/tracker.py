"""Define what a tracker of experiments is told of a run, and what a tracker does."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from cache.system import durable
from pipeline.config import Config
from pipeline.config_file import flat
from pipeline.runs.metrics import CURVES

ID = "tracking.json"  # the file that keeps the tracked run's identity in a run's folder
# What trackers may leave in a run's folder; MLflow's if no server or store is named.
LEFT = (ID, "wandb", "mlflow.db", "mlflow.db-journal", "mlartifacts")
BEST = "best/top1"  # tag of the best validation top-1
# How a run ended.
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker is told of it.

    out: its folder. config: everything that was decided, under flat keys. facts: what
    the run was made from; their keys begin with ``run.``, as no key of a config does.
    """

    out: Path
    config: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def of(cls, out: Path, config: Config, facts: dict[str, Any]) -> Tracked:
        """Describe the run in ``out``."""
        own = {"run.folder": out.name, "run.version": _version()}
        return cls(out, flat(config.model_dump(mode="json")), {**facts, **own})

    def identity(self) -> str:
        """Return the tracked run's identity, 16 hexadecimal digits. The first call of
        a run draws the identity, and keeps it in the run's folder."""
        file = self.out / ID
        try:
            return str(json.loads(file.read_text("utf-8"))["id"])
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
            drawn = secrets.token_hex(8)
            durable.write(file, lambda scratch: scratch.write_text(json.dumps({"id": drawn})))
            return drawn


class Tracker(Protocol):
    """A tracker that follows one run.

    Every method may raise any error; then ``begin`` is called again before the next
    ``write``. A tracked run has each figure of each pass once, at the pass's own step:
    the epochs done.
    """

    def begin(self) -> str:
        """Go on in the run's tracked run, or begin one. Returns where it is found."""

    def write(self, metrics: Sequence[dict]) -> None:
        """Write the figures that the tracked run lacks of all passes so far."""

    def end(self, metrics: Sequence[dict], outcome: str) -> None:
        """Write the best top-1, and mark the tracked run as ended."""


def figures(one: dict) -> dict[str, float]:
    """Return the figures of a pass by their tags, as TensorBoard gets them."""
    return {curve.tag: one[curve.key] for curve in CURVES if one.get(curve.key) is not None}


def default(variable: str, value: object) -> None:
    """Set an environment variable that a library reads, unless the user has set it."""
    os.environ.setdefault(variable, str(value))


def _version() -> str:
    """Return this program's version; "unknown" if it runs without being installed."""
    try:
        return version("offline-meal-v2")
    except PackageNotFoundError:
        return "unknown"
