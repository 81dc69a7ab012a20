"""The curves of a training run, as TensorBoard events and as one picture: what its
metrics say, over the epochs that are done."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache.system import durable
from pipeline.config import Config
from pipeline.runs.metrics import CURVES, Curve, best_of, labels_of, points
from pipeline.runtime.progress import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


EVENTS = "events.out.tfevents."  # what TensorBoard knows its files by
PICTURE = "curves.png"
SHARE = 20  # a drawing may cost one part in so many of the time since the one before
FIRST = 0.5  # seconds that a process's first drawing is taken to cost
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito's, told apart by everyone
PANEL_INCHES, DPI = (3.4, 2.9), 100
INK = "#666666"  # of what is beside the curves
FAR = {
    "lr": 5,
    "nats": 30,
}  # key or unit: how many times its least the greatest value must be for an axis of powers


class Curves:
    """The curves of the run in ``out``, which one process writes.

    Events and picture are made of the run's metrics alone, after its state is saved. A
    process's first ``show`` removes the events of earlier ones and writes the whole
    history into a new file, so that after a kill, a restart or an update too the events
    are what metrics.jsonl says. The picture is drawn anew after a pass if the last
    drawing took no more than a twentieth of the time since then, so that epochs of a
    second don't each wait for one, and always after the run's last pass. A drawing
    takes some 0.3 s, and 0.5 s of imports come before the first.
    """

    def __init__(self, out: Path, config: Config) -> None:
        self.out, self.config = out, config
        self.events: Path | None = None
        self.written = 0  # passes in the events
        self.drawn, self.cost = (
            time.monotonic(),
            FIRST,
        )  # when the last drawing ended, and its seconds

    def show(self, metrics: Sequence[dict]) -> None:
        """metrics: of all passes so far, the newest last, one at least. No training
        ends for want of a picture: what fails is said, and begun anew after the next
        pass."""
        try:
            self._show(metrics)
        except Exception as error:  # a library that is broken here, a font, a disk
            self.events, self.written = None, 0
            say(
                f"warning: the curves in {self.out} could not be brought up to date "
                f"({type(error).__name__}: {error}); training goes on without them"
            )

    def _show(self, metrics: Sequence[dict]) -> None:
        if self.events is None:
            self._begin()
        self._append(metrics[self.written :])
        finished = metrics[-1]["epoch"] + 1 >= self.config.train.epochs
        begun = time.monotonic()
        if finished or begun - self.drawn >= SHARE * self.cost:
            self._draw(metrics)
            self.drawn = time.monotonic()
            self.cost = self.drawn - begun

    def _begin(self) -> None:
        """A new file instead of the old ones; a TensorBoard that has read those forgets
        their points.

        The newest of the old ones stays, empty, until the next start: TensorBoard
        without its data server goes on to the next file only while the one that it was
        at exists.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        before = sorted(
            file
            for file in self.out.iterdir()
            if file.name.startswith(EVENTS) and not file.is_dir()
        )
        now = time.time()
        self.events = (
            self.out
            / f"{EVENTS}{now:.6f}.{socket.gethostname().replace(os.sep, '_')}.{os.getpid()}"
        )
        started = SessionLog(status=SessionLog.START)
        self._record(
            [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=0, session_log=started),
            ]
        )
        for file in before[:-1]:
            file.unlink()
        for file in before[-1:]:
            durable.write(
                file, lambda scratch: scratch.touch()
            )  # not emptied in place: it may be a link to another run's

    def _append(self, metrics: Sequence[dict]) -> None:
        """An event a pass. When those of earlier processes ended isn't known: they are
        placed as if there had been no pause, so that TensorBoard's relative time is
        training time."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        ended = time.time() - sum(m["seconds"] for m in metrics)
        events = []
        for m in metrics:
            ended += m["seconds"]
            values = [
                Summary.Value(tag=curve.tag, simple_value=m[curve.key])
                for curve in CURVES
                if m.get(curve.key) is not None
            ]
            events.append(
                Event(wall_time=ended, step=m["epoch"] + 1, summary=Summary(value=values))
            )
        self._record(events)
        self.written += len(metrics)

    def _record(self, events: Iterable) -> None:
        """Not with torch's SummaryWriter: that one keeps a thread, and loads TensorFlow
        where that is installed."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self.events, "ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())

    def _draw(self, metrics: Sequence[dict]) -> None:
        figure = picture(metrics, self.config)
        durable.write(self.out / PICTURE, lambda scratch: figure.savefig(scratch, format="png"))


def picture(metrics: Sequence[dict], config: Config) -> Figure:
    """A panel for each curve that the run has, with its last value, and the best top-1
    marked."""
    shown = [curve for curve in CURVES if not curve.beside and points(metrics, curve.key)[0]]
    model = config.student.model if config.student else ""
    title = (
        f"{model}, {labels_of(config)} labels: {metrics[-1]['epoch'] + 1} of "
        f"{config.train.epochs} epochs"
    )
    figure, places = small_multiples(len(shown), title)
    for curve, axes in zip(shown, places, strict=True):
        together = [curve, *(other for other in CURVES if other.beside == curve.key)]
        for part, colour in zip(together, COLOURS, strict=False):
            line(
                axes,
                *points(metrics, part.key),
                color=colour,
                label="both" if part is curve else part.name,
            )
        note = f"last {points(metrics, curve.key)[1][-1]:.4g}"
        if curve.key == "val_top1":
            epoch, top1 = best_of(metrics)
            axes.plot(epoch, top1, marker="o", markersize=6, color=COLOURS[1])
            note = f"best {top1:.2f}, epoch {epoch}"
        furnish(axes, curve, (metrics[0]["epoch"] + 1, metrics[-1]["epoch"] + 1), note)
        if len(together) > 1:
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.2 * (high - low), high)
            axes.legend(
                fontsize=7,
                loc="lower center",
                ncols=len(together),
                handlelength=1,
                columnspacing=1,
                frameon=False,
            )
    return figure


def grid(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels, one at least."""
    rows = 1 if count <= 3 else 2
    return rows, math.ceil(count / rows)


def small_multiples(count: int, title: str, head: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels. head: inches to be left free below the title.
    Margins are fixed, since matplotlib's layouts double the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = grid(count)
    left, right, bottom, top, between = 0.75, 0.25, 0.5, 0.75 + head, (0.75, 0.8)
    width, height = columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + head + 0.2
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    panel = (
        (width - left - right - (columns - 1) * between[0]) / columns,
        (height - bottom - top - (rows - 1) * between[1]) / rows,
    )
    spacing = {"wspace": between[0] / panel[0], "hspace": between[1] / panel[1]}
    figure.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - top / height, **spacing
    )
    figure.text(
        left / width,
        1 - 0.2 / height,
        title,
        fontsize=12,
        fontweight="bold",
        va="top",
        parse_math=False,
    )
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def line(axes: Axes, epochs: list[int], values: list[float], **style: object) -> None:
    """A curve; with few points they are to be seen, and a single one anyway."""
    axes.plot(
        epochs,
        values,
        linewidth=1.4,
        marker="." if len(epochs) <= 40 else None,
        markersize=4,
        **style,
    )


def furnish(axes: Axes, curve: Curve, span: tuple[int, int], note: str = "") -> None:
    """Title and note above; whole epochs of the span below; powers where the values
    fall far; no shares outside of 0 … 100 %."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_title(
        curve.name, loc="left", fontsize=10, y=1.0
    )  # with y given matplotlib needn't look for room
    axes.set_title(note, loc="right", fontsize=8, color=INK, y=1.0)
    axes.set_xlabel("epochs done", fontsize=8, color=INK)
    axes.set_ylabel(curve.unit, fontsize=8, color=INK)
    room = max(0.03 * (span[1] - span[0]), 0.2)
    axes.set_xlim(span[0] - room, span[1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    low, high = axes.dataLim.intervaly
    if low > 0 and FAR.get(curve.key, FAR.get(curve.unit, math.inf)) * low <= high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,))
        )
        axes.yaxis.set_minor_locator(NullLocator())
    if curve.unit.startswith("%"):
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -1), min(top, 101))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8, length=2)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
