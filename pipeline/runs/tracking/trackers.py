"""Tell a run's figures to the trackers that the user asked for. A tracker that fails
never stops the training."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.runs.tracking.mlflow_runs import MLflow
from pipeline.runs.tracking.names import TRACKERS, Wanted
from pipeline.runs.tracking.tracker import FAILED, FINISHED, STOPPED, Tracked, Tracker
from pipeline.runs.tracking.weights_and_biases import WeightsAndBiases, require_key
from pipeline.runtime.progress import say

KINDS: dict[str, Callable[[Tracked, str], Tracker]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
SHARE = 20  # tries that fail may take 1/SHARE of the time


def require_trackers(wanted: tuple[str, ...]) -> None:
    """Raise TrackingError for a tracker that can't be used here: unknown, not installed
    or, for Weights & Biases online, without a key."""
    for tracker, _ in map(Wanted.of, wanted):
        if tracker == "wandb":
            require_key()


class Trackers:
    """Tells one run to trackers. The first process alone does it."""

    def __init__(self, tracked: Tracked, wanted: Sequence[str]) -> None:
        self.metrics: Sequence[dict] = ()
        self.guards = [
            Guard(KINDS[tracker](tracked, project), TRACKERS[tracker])
            for tracker, project in dict.fromkeys(map(Wanted.of, wanted))
        ]

    def show(self, metrics: Sequence[dict]) -> None:
        """Bring the trackers up to date with the metrics of all passes so far."""
        self.metrics = list(metrics)
        for guard in self.guards:
            guard.attempt(lambda tracker: tracker.write(self.metrics))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Begin the tracked runs, and end them with the block: as finished, unless an
        error or a signal ends the block."""
        outcome = FAILED
        try:
            for guard in self.guards:
                guard.attempt(lambda tracker: None)
            yield
            outcome = FINISHED
        except KeyboardInterrupt:
            outcome = STOPPED
            raise
        finally:
            for guard in self.guards:
                guard.attempt(lambda tracker: self._end(tracker, outcome), last=True)

    def _end(self, tracker: Tracker, outcome: str) -> None:
        tracker.write(self.metrics)
        tracker.end(self.metrics, outcome)


class Guard:
    """Keeps the failures of a tracker from the training.

    A failure is one line. The tracker is begun anew at a later pass, and then gets all
    that it lacks. A server that hangs is tried again only when the last try took less
    than a twentieth of the time since then.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.tracker, self.name = tracker, name
        self.begun = self.told = False
        self.again = 0.0  # not before this time is the tracker tried again

    def attempt(self, act: Callable[[Tracker], None], *, last: bool = False) -> None:
        """Do something with the tracker, which is begun if need be. last: try in any
        case, since there is no later try."""
        started = time.monotonic()
        if started < self.again and not last:
            return
        try:
            if not self.begun:
                where = self.tracker.begin()
                self.begun = True
                if not self.told:
                    self.told = True
                    say(f"tracked in {where}")
            act(self.tracker)
        except Exception as error:  # a server that is gone, a full disk, a broken library
            now = time.monotonic()
            self.begun, self.again = False, now + SHARE * (now - started)
            later = "the next start of this command" if last else "a later pass"
            say(
                f"warning: {self.name} could not be told of the run ({type(error).__name__}: "
                f"{without_secrets(' '.join(str(error).split()))[:200]}); training goes on, and "
                f"{later} tries again"
            )


def without_secrets(text: str) -> str:
    """Return a text with user and password of each URL left out."""
    return re.sub(r"://[^/\s@]+@", "://…@", text)
