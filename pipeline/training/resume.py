"""Decide whether the run in a folder may be resumed."""

from __future__ import annotations

from pathlib import Path

from cache.format.schema import first_difference
from pipeline.config import Config
from pipeline.config_file import flat
from pipeline.runs.curves import EVENTS, PICTURE
from pipeline.runs.folder import CONFIG, METRICS, SCANS, STATE, WEIGHTS, RunError, RunFolder
from pipeline.runs.tracking.tracker import LEFT
from pipeline.training.source import Source, StoredLabels

# Beginnings of the config keys whose values may change when a run is resumed.
FREE_KEYS = (
    "train.epochs",
    "render.threads",
    "render.max_megapixels",
    "teachers",
    "store",
    "crops.views",
)
JUDGE = "train.discriminator."


def config_of_run(out: Path) -> Config | None:
    """Return the config that the run in ``out`` began with; None if there is no run.
    Whatever the user leaves open goes on as it began."""
    if not (out / STATE).exists():
        return None
    try:
        return RunFolder(out).config()
    except RunError:  # state_of_run raises it again
        return None


def classes_of_run(out: Path) -> list[str] | None:
    """Return the class names of the run in ``out``; None if there is no run, or if the
    run's version recorded none."""
    if not (out / STATE).exists():
        return None
    try:
        return RunFolder(out).header("last").get("class_names")
    except RunError:
        return None


def state_of_run(out: Path, config: Config, source: Source) -> dict | None:
    """Return the state that the run in ``out`` resumes from; None for a new run. Raises
    RunError unless ``out`` is empty or holds a part of this very run."""
    run = RunFolder(out, "choose another --out")
    state = run.state()
    if state is None:
        # A kill in the first epoch leaves these files without a state.
        weights = {f"{name}.safetensors" for name in WEIGHTS}
        ours = {CONFIG, *SCANS, *weights, METRICS, PICTURE, *LEFT}
        if out.exists() and any(
            p.name not in ours and not p.name.startswith((".", EVENTS)) for p in out.iterdir()
        ):
            raise RunError(f"{out} is not empty and holds no run; choose another --out")
        if run.lines() > 1:
            raise RunError(
                f"{out} holds a run whose state.pt is gone, so it can't go on; choose another --out"
            )
    else:
        before, now = (
            flat(run.config().model_dump(mode="json")),
            flat(config.model_dump(mode="json")),
        )
        for key in [*now, *(before.keys() - now.keys())]:
            if not _free(key, config) and before.get(key) != now.get(key):
                raise RunError(
                    f"{out} was started with {key} {before.get(key)}, this is {now.get(key)}; pass "
                    f"the same to go on, or choose another --out"
                )
        _require_same_teachers(out, state.get("how", {}), source.how)
        if state["source"] != source.identity:
            what = (
                "another label store"
                if isinstance(source, StoredLabels)
                else "other images or classes"
            )
            raise RunError(
                f"{out} was started with {what}; pass the same to go on, or choose another --out"
            )
    return state


def _require_same_teachers(out: Path, before: dict, now: dict) -> None:
    """Raise RunError if live teachers' labels now depend on other values than at the
    start of the run."""
    if difference := next(
        (found for key in now if (found := first_difference(key, before.get(key), now[key]))), None
    ):
        where, theirs, ours = difference
        raise RunError(
            f"{out} was started with {where} {theirs}, this is {ours}; pass the same to go on, or "
            f"choose another --out"
        )


def _free(key: str, config: Config) -> bool:
    """Return whether the value of a config key may change when a run is resumed."""
    judge = config.train.discriminator
    if judge and key.startswith(JUDGE) and key.removeprefix(JUDGE) in judge.unused:
        return True
    if key == "train.epochs":
        return config.train.schedule != "cosine"  # every step of a cosine depends on its end
    return key.startswith(FREE_KEYS)
