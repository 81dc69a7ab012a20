"""Compare training runs: the figures that each run reached, the settings that differ,
and the curves in one picture."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from cache.errors import printable
from cache.system import durable
from cache.system.local import require_local
from pipeline.config import Config
from pipeline.config_file import flat
from pipeline.runs.curves import COLOURS, furnish, grid, line, small_multiples
from pipeline.runs.folder import RunError, RunFolder
from pipeline.runs.metrics import CURVES, best_of, images_of, labels_of, points
from pipeline.runtime.progress import duration, results

STYLES = ("-", "--", "-.", ":")  # with seven colours, enough for 28 different lines
KINDS = ("png", "pdf", "svg")  # file endings of a picture
# Longest name of a run in the picture, and height of a line of names.
LEGEND_CHARACTERS, LEGEND_INCHES = 48, 0.19


@dataclass(frozen=True)
class RunFacts:
    """What a run reached. None stands for a figure that the run doesn't have.

    name: the shortest end of its path that no other run has. epochs, of: done, and to
    be done. top1, top5, agreement: %. losses and KL: nats. seconds: of training,
    without validation. metrics: of each pass over the images.
    """

    name: str
    path: str
    student: str | None
    labels: str
    epochs: int
    of: int
    best_top1: float | None
    best_epoch: int | None
    best_ema_top1: float | None
    top1: float | None
    top5: float | None
    val_loss: float | None
    loss: float
    kl: float | None
    agreement: float | None
    images_per_second: float | None
    seconds: float
    metrics: list[dict]


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given, and the settings in which they differ: dotted config key
    → {run's name: value}."""

    runs: list[RunFacts]
    differences: dict[str, dict[str, object]]


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare run directories. Raises RunError."""
    folders = [Path(os.path.abspath(run)) for run in runs]
    if twice := next((folder for i, folder in enumerate(folders) if folder in folders[:i]), None):
        raise RunError(f"{twice} is named twice; name each run once")
    names = _names(folders)
    read = [RunFolder(folder, "leave this run out, or bring the file back") for folder in folders]
    configs, histories = [run.config() for run in read], [run.metrics() for run in read]
    told = zip(names, folders, configs, histories, strict=True)
    return Comparison([_facts(*one) for one in told], _differences(names, configs))


def _names(folders: list[Path]) -> list[str]:
    """Return the shortest end of each path that no other path has."""

    def ends(folder: Path, parts: int) -> tuple[str, ...]:
        return folder.parts[-parts:]

    names = []
    for folder in folders:
        shared = (
            parts
            for parts in range(1, len(folder.parts) + 1)
            if sum(ends(f, parts) == ends(folder, parts) for f in folders) == 1
        )
        names.append(str(Path(*ends(folder, next(shared)))))
    return names


def _facts(name: str, folder: Path, config: Config, metrics: list[dict]) -> RunFacts:
    last, best = metrics[-1], best_of(metrics)
    seconds = sum(m["seconds"] for m in metrics)
    images = sum(images_of(m) for m in metrics)
    return RunFacts(
        name=name,
        path=str(folder),
        student=config.student.model if config.student else None,
        labels=labels_of(config),
        epochs=last["epoch"] + 1,
        of=config.train.epochs,
        best_top1=best and best[1],
        best_epoch=best and best[0],
        best_ema_top1=max(points(metrics, "val_top1_ema")[1], default=None),
        top1=last.get("val_top1"),
        top5=last.get("val_top5"),
        val_loss=last.get("val_loss"),
        loss=last["loss"],
        kl=last.get("kl"),
        agreement=last.get("agreement"),
        images_per_second=images / seconds if seconds else None,
        seconds=seconds,
        metrics=metrics,
    )


def _differences(names: list[str], configs: list[Config]) -> dict[str, dict[str, object]]:
    """Return the settings that differ: dotted config key → {run's name: value}. The
    values of a section that is null in a run are None for this run."""
    settings = [flat(config.model_dump(mode="json")) for config in configs]
    keys = dict.fromkeys(key for one in settings for key in one)  # in the order of the config
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {
        key: dict(zip(names, of, strict=True))
        for key, of in values.items()
        if any(value != of[0] for value in of)
    }


def draw(result: Comparison, file: Path) -> None:
    """Draw the runs' curves, with a panel for each figure that any run has.

    Each run's best top-1 is marked. file: a PNG, PDF or SVG, by its ending. Raises
    RunError for another ending.
    """
    from matplotlib.lines import Line2D

    require_local(file)
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    kind = file.suffix[1:].lower()
    if kind not in KINDS:
        raise RunError(
            f"{file} must end in {', '.join(f'.{k}' for k in KINDS)}, which says what kind of "
            f"picture it is to be; name another file"
        )
    runs = result.runs
    shown = [
        curve
        for curve in CURVES
        if not curve.beside and any(points(run.metrics, curve.key)[0] for run in runs)
    ]
    names = [_legend(run) for run in runs]
    # A panel is some 55 characters wide.
    across = max(1, min(len(runs), grid(len(shown))[1] * 55 // (8 + max(map(len, names)))))
    title = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    figure, places = small_multiples(
        len(shown), title, LEGEND_INCHES * math.ceil(len(runs) / across)
    )
    span = min(run.metrics[0]["epoch"] for run in runs) + 1, max(run.epochs for run in runs)
    looks: list[dict[str, Any]] = [
        {"color": colour, "linestyle": style}
        for _, colour, style in zip(runs, cycle(COLOURS), cycle(STYLES))
    ]
    for curve, axes in zip(shown, places, strict=True):
        for run, look in zip(runs, looks, strict=True):
            line(axes, *points(run.metrics, curve.key), **look)
            if curve.key == "val_top1" and run.best_epoch:
                axes.plot(
                    run.best_epoch,
                    run.best_top1,
                    marker="o",
                    markersize=6,
                    color=look["color"],
                )
        furnish(axes, curve, span, "● best" if curve.key == "val_top1" else "")
    width, height = figure.get_size_inches()
    corner = (0.66 / width, 1 - 0.4 / height)
    handles = [Line2D([], [], linewidth=1.4, **look) for look in looks]
    legend = figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=across,
        fontsize=8,
        frameon=False,
        handlelength=3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    with warnings.catch_warnings():
        # A name may have characters that the font lacks.
        warnings.simplefilter("ignore", UserWarning)
        durable.write(file.absolute(), lambda scratch: figure.savefig(scratch, format=kind))


def _legend(run: RunFacts) -> str:
    """Return a run's name for the legend. A blank comes first, since matplotlib leaves
    out names that begin with an underscore."""
    name = printable(run.name)
    short = name if len(name) <= LEGEND_CHARACTERS else f"…{name[1 - LEGEND_CHARACTERS :]}"
    return f" {short}" + (f" (best {run.best_top1:.2f})" if run.best_top1 is not None else "")


def comparison_page(result: Comparison) -> None:
    """Print the figures that any run has, then the settings that differ, with a column
    for each run."""
    runs, console = result.runs, results()
    figures = _table("", runs, "right")
    for name, told in (
        ("student", [run.student or "" for run in runs]),
        ("labels", [run.labels for run in runs]),
        ("epochs", [f"{run.epochs} of {run.of}" for run in runs]),
        ("best top-1 %", _numbers(runs, "best_top1", ".2f")),
        ("  after epoch", _numbers(runs, "best_epoch", "d")),
        ("best top-1 % of EMA", _numbers(runs, "best_ema_top1", ".2f")),
        ("top-1 %", _numbers(runs, "top1", ".2f")),
        ("top-5 %", _numbers(runs, "top5", ".2f")),
        ("validation loss", _numbers(runs, "val_loss", ".4f")),
        ("loss", _numbers(runs, "loss", ".4f")),
        ("KL to labels", _numbers(runs, "kl", ".4f")),
        ("agreement %", _numbers(runs, "agreement", ".2f")),
        ("images/s", _numbers(runs, "images_per_second", ",.0f")),
        ("time", [duration(run.seconds) for run in runs]),
    ):
        if any(told):
            figures.add_row(name, *(Text(printable(one)) for one in told))
    console.print(figures)
    if result.differences:
        settings = _table("setting", runs, "left")
        for key, values in result.differences.items():
            settings.add_row(key, *(Text(printable(_value(value))) for value in values.values()))
        console.print()
        console.print(settings)
    elif len(runs) > 1:
        console.print("\nthe settings are the same")


def _table(first: str, runs: list[RunFacts], justify: Literal["left", "right"]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for run in runs:
        table.add_column(Text(printable(run.name)), justify=justify, overflow="fold")
    return table


def _numbers(runs: list[RunFacts], key: str, form: str) -> list[str]:
    return ["" if getattr(run, key) is None else format(getattr(run, key), form) for run in runs]


def _value(value: object) -> str:
    """Return a value as a config writes it."""
    return value if isinstance(value, str) else json.dumps(value)
