"""Follow a run in MLflow: on a server, or in a database."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from pipeline.runs.metrics import CURVES, best_of, ended
from pipeline.runs.tracking.names import PROJECT
from pipeline.runs.tracking.tracker import BEST, FINISHED, STOPPED, Tracked, default, figures

# Variables of the library that bound how long a server may hang (its own: 120 s, seven
# times), and keep the library from talking: to its makers, and on stdout and stderr.
SURROUNDINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": 10,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
MARK = "offline_meal_v2.id"  # tag by which the tracked run of a run's folder is found
STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED"}  # otherwise FAILED
# The library's limits: of a parameter's and a tag's length, and of a request's numbers
# of metrics and parameters.
LONGEST_PARAMETER, LONGEST_TAG, MOST_METRICS, MOST_PARAMETERS = 6000, 5000, 1000, 100


class MLflow:
    """Follows one run in MLflow, through a client of its own: the library's global
    state (its active run) is untouched.

    The tracked run carries the identity of the run's folder as a tag, and is found by
    it. What the tracked run lacks is the difference between the run's metrics and the
    history of each figure there.
    """

    def __init__(self, tracked: Tracked, experiment: str) -> None:
        self.tracked, self.experiment = tracked, experiment
        self.client: Any = None
        self.id = ""
        self.known: set[tuple[str, int]] = set()  # tag and step of figures that are there

    def begin(self) -> str:
        """Go on in the run's tracked run, or begin one. Returns store and run."""
        for variable, value in SURROUNDINGS.items():
            default(variable, value)
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.tracked.out}/mlflow.db"
        self.client = MlflowClient(place)
        experiment = self._experiment()
        mark = self.tracked.identity()
        there = self.client.search_runs(
            [experiment], filter_string=f"tags.`{MARK}` = '{mark}'", max_results=1
        )
        if there:
            self.id = there[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {MARK: mark}
            run = self.client.create_run(experiment, tags=tags, run_name=self.tracked.out.name)
            self.id = run.info.run_id
        self._describe(there[0].data.params if there else {})
        self.known = {
            (tag, point.step)
            for tag in [*(curve.tag for curve in CURVES), BEST]
            for point in (self.client.get_metric_history(self.id, tag) if there else ())
        }
        # The address may hold a password.
        where = "its server" if "://" in place and "@" in place else place
        return f"MLflow: run {self.id} at {where}"

    def write(self, metrics: Sequence[dict]) -> None:
        """Write the figures that the tracked run lacks. The passes of earlier
        processes are placed as if there had been no pause, as in TensorBoard."""
        from mlflow.entities import Metric

        self._write(
            [
                Metric(tag, value, int(1000 * when), one["epoch"] + 1)
                for one, when in zip(metrics, ended(metrics, time.time()), strict=True)
                for tag, value in figures(one).items()
            ]
        )

    def end(self, metrics: Sequence[dict], outcome: str) -> None:
        """Write the best top-1, at the step of its pass, and mark the tracked run as
        finished, killed or failed."""
        from mlflow.entities import Metric

        if best := best_of(metrics):
            self._write([Metric(BEST, best[1], int(1000 * time.time()), best[0])])
        self.client.set_terminated(self.id, STATUS.get(outcome, "FAILED"))

    def _write(self, points: list) -> None:
        lacking = [point for point in points if (point.key, point.step) not in self.known]
        for start in range(0, len(lacking), MOST_METRICS):
            part = lacking[start : start + MOST_METRICS]
            self.client.log_batch(self.id, metrics=part, synchronous=True)
            self.known |= {(point.key, point.step) for point in part}

    def _experiment(self) -> str:
        """Return the number of the experiment, which is created if need be."""
        number = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if number and not self.experiment:
            return number
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        own = not os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = (self.tracked.out / "mlartifacts").as_uri() if own else None
        try:
            return self.client.create_experiment(name, artifact_location=artifacts)
        except Exception:  # another run has created it meanwhile, or it failed indeed
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _describe(self, before: dict[str, str]) -> None:
        """Tell config and facts. MLflow's parameters can't change: a value that another
        start of the run changed becomes a tag of its key's name."""
        from mlflow.entities import Param, RunTag

        told = {
            key: shortened(str(value), LONGEST_PARAMETER)
            for key, value in self.tracked.config.items()
        }
        new = [Param(key, value) for key, value in told.items() if key not in before]
        facts = {
            **self.tracked.facts,
            **{key: value for key, value in told.items() if before.get(key, value) != value},
        }
        tags = [RunTag(key, shortened(str(value), LONGEST_TAG)) for key, value in facts.items()]
        for start in range(0, len(new), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=new[start : start + MOST_PARAMETERS])
        self.client.log_batch(self.id, tags=tags)


def shortened(text: str, longest: int) -> str:
    """Return a text of at most ``longest`` characters; what is cut ends in "…"."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
