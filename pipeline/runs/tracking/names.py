"""Read from the command line which trackers a run is told to, and refuse those that
can't work before anything else is done."""

from __future__ import annotations

import difflib
import importlib.util
from typing import NamedTuple

from cache.errors import MealError

TRACKERS = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
PROJECT = "offline-meal-v2"  # unless the user or the tracker's own variables name one


class TrackingError(MealError):
    """A tracker that can't be used."""


class Wanted(NamedTuple):
    """A tracker that the user asked for.

    project: W&B's project or MLflow's experiment; empty if the user named none.
    """

    tracker: str
    project: str = ""

    @classmethod
    def of(cls, text: str) -> Wanted:
        """Read TRACKER or TRACKER:PROJECT. Raises TrackingError for an unknown
        tracker, and for one whose package is not installed."""
        tracker, colon, project = text.partition(":")
        if tracker not in TRACKERS:
            (near,) = difflib.get_close_matches(tracker.lower(), TRACKERS, 1, 0.0) or ["wandb"]
            raise TrackingError(
                f"--track {text} names no tracker; pass {' or '.join(TRACKERS)} (did you mean "
                f"{near}?)"
            )
        if colon and not project:
            raise TrackingError(f"--track {text} names no project; pass {tracker}:PROJECT")
        if importlib.util.find_spec(tracker) is None:
            raise TrackingError(
                f"--track {tracker} needs the package {tracker}, which is not installed; pip "
                f'install "offline-meal-v2[track]"'
            )
        return cls(tracker, project)
