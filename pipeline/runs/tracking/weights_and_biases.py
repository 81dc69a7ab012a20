"""Follow a run in Weights & Biases, online or offline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.runs.metrics import best_of
from pipeline.runs.tracking.names import PROJECT, TrackingError
from pipeline.runs.tracking.tracker import BEST, FAILED, FINISHED, Tracked, default, figures

# Variables of the library, and its settings, that bound how long a server may hang.
PATIENCE = {
    "WANDB_INIT_TIMEOUT": ("init_timeout", 20.0),
    "WANDB_FINISH_TIMEOUT": ("finish_timeout", 20.0),
}
# Only what this program tells goes to the tracker: neither the terminal's lines, nor
# code, nor the machine.
QUIET = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
}
LOCAL = ("offline", "dryrun", "disabled")  # modes that need no server


def require_key() -> None:
    """Raise TrackingError if runs would go to a server and no key for it is known.

    The library would ask for a key on a terminal, in the midst of the start.
    """
    import_quietly()
    import wandb

    if os.environ.get("WANDB_MODE", "online").lower() in LOCAL:
        return
    known = True
    with suppress(Exception):  # the library's own words, when the run begins
        known = wandb.login(prompt=False, verify=False)
    if not known:
        raise TrackingError(
            "--track wandb finds no key of Weights & Biases; run wandb login, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline and send the run later"
        )


def import_quietly() -> None:
    """Keep the library from reporting its own errors to its makers."""
    default("WANDB_ERROR_REPORTING", "false")


class WeightsAndBiases:
    """Follows one run in Weights & Biases.

    A step of the tracked run is the epochs done. A server refuses steps at or below the
    newest step that it has, and takes steps in order. So whatever it lacks comes after
    its newest step, which the library tells when a run is resumed. Offline the library
    knows nothing of earlier starts: each start writes the whole history into a folder
    of its own, and removes the folders of earlier starts.
    """

    def __init__(self, tracked: Tracked, project: str) -> None:
        self.tracked, self.project = tracked, project
        self.run: Any = None
        self.newest = 0  # step that is written

    def begin(self) -> str:
        """Go on in the run's tracked run, or begin one. Returns its address, or its
        folder if it is offline."""
        self._leave()
        import_quietly()
        place = Path(os.environ.get("WANDB_DIR") or self.tracked.out)
        default("WANDB_CACHE_DIR", place / "wandb" / "cache")
        import wandb

        known = type(wandb.Settings()).model_fields  # private ones may go
        bounds = {name: s for key, (name, s) in PATIENCE.items() if key not in os.environ}
        settings = {k: v for k, v in {**QUIET, **bounds}.items() if k in known}
        self.run = wandb.init(
            project=self.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self.tracked.identity(),
            name=os.environ.get("WANDB_NAME") or self.tracked.out.name,
            resume="allow",
            dir=str(place),
            settings=wandb.Settings(**settings),
        )
        # Not in init: a resumed run may have other values, as of train.epochs.
        told = {**self.tracked.config, **self.tracked.facts}
        self.run.config.update(told, allow_val_change=True)
        self.newest = max(0, self.run.starting_step - 1)
        # Offline the library warns whoever asks for the address.
        return f"Weights & Biases: {self.run.dir if self.run.offline else self.run.url}"

    def write(self, metrics: Sequence[dict]) -> None:
        """Write the passes after the newest step that is written."""
        for one in metrics:
            if one["epoch"] + 1 > self.newest:
                self.newest = one["epoch"] + 1
                self.run.log(figures(one), step=self.newest)
        if self.run.offline and metrics:  # the whole history is in this start's folder now
            own = Path(self.run.dir).parent
            for folder in own.parent.glob(f"offline-run-*-{self.run.id}"):
                if folder != own:
                    shutil.rmtree(folder, ignore_errors=True)

    def end(self, metrics: Sequence[dict], outcome: str) -> None:
        """Write the best top-1, and end the tracked run: as finished, or as failed.

        The library waits for its server, some 20 s at most (``PATIENCE``).
        """
        run, self.run = self.run, None
        if best := best_of(metrics):
            run.summary.update({BEST: best[1], "best/epochs_done": best[0]})
        run.finish(exit_code=0 if outcome == FINISHED else 1)

    def _leave(self) -> None:
        """End a tracked run that failed before."""
        if self.run is not None:
            with suppress(Exception):
                self.end((), FAILED)
