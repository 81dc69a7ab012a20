"""Draw the metrics of a training run over the finished epochs, as TensorBoard events
and as one picture."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.system import durable
from pipeline.config import Config
from pipeline.runs.metrics import CURVES, Curve, best_of, ended, labels_of, points
from pipeline.runtime.progress import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


EVENTS = "events.out.tfevents."  # start of the names by which TensorBoard finds its files
PICTURE = "curves.png"
SHARE = 20  # a drawing may take 1/SHARE of the time since the drawing before
FIRST = 0.5  # seconds that a process's first drawing is assumed to take
# Okabe and Ito's palette, which colour-blind readers can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANEL_INCHES, DPI = (3.4, 2.9), 100
INK = "#666666"  # colour of notes and axis labels
# Key or unit of a curve → least ratio of the greatest value to the smallest at which
# the axis becomes logarithmic.
FAR = {"lr": 5, "nats": 30}


class Curves:
    """Writes the curves of the run in ``out``. One process alone may write them.

    Events and picture are made from the run's metrics alone, after the run's state is
    saved. The first ``show`` of a process removes the events of earlier processes and
    writes the whole history into a new file. So the events agree with metrics.jsonl
    after a kill, a restart or an update too.

    The picture is drawn again after a pass if the last drawing took at most a twentieth
    of the time since then, so that epochs of a second don't each wait for a drawing.
    The picture is always drawn after the run's last pass. A drawing takes some 0.3 s,
    and 0.5 s of imports come before the first drawing.
    """

    def __init__(self, out: Path, config: Config) -> None:
        self.out, self.config = out, config
        self.events: Path | None = None
        self.written = 0  # passes in the events
        # When the last drawing ended, and the seconds that it took.
        self.drawn, self.cost = time.monotonic(), FIRST

    def show(self, metrics: Sequence[dict]) -> None:
        """Bring events and picture up to date with the metrics of all passes so far,
        the newest last, one pass at least.

        A failure is printed as a warning and doesn't end the training. The events are
        then begun anew after the next pass.
        """
        try:
            self._show(metrics)
        except Exception as error:  # a broken library, a missing font, a full disk
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
        """Begin a new event file, and remove the old files. A TensorBoard that has read
        the old files forgets their points.

        The newest old file stays, empty, until the next start: TensorBoard without its
        data server moves on to the next file only while the file that it was reading
        exists.
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
            # Replaced, not emptied in place: the file may be a link to another run's.
            durable.write(file, lambda scratch: scratch.touch())

    def _append(self, metrics: Sequence[dict]) -> None:
        """Append an event for each pass.

        The events of passes of earlier processes are placed as if there had been no
        pause, so that TensorBoard's relative time is training time.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        for m, when in zip(metrics, ended(metrics, time.time()), strict=True):
            values = [
                Summary.Value(tag=curve.tag, simple_value=m[curve.key])
                for curve in CURVES
                if m.get(curve.key) is not None
            ]
            events.append(Event(wall_time=when, step=m["epoch"] + 1, summary=Summary(value=values)))
        self._record(events)
        self.written += len(metrics)

    def _record(self, events: Iterable) -> None:
        """Append events to the file. torch's SummaryWriter is not used, since it would
        keep a thread, and load TensorFlow where TensorFlow is installed."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self.events, "ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())

    def _draw(self, metrics: Sequence[dict]) -> None:
        figure = picture(metrics, self.config)
        durable.write(self.out / PICTURE, lambda scratch: figure.savefig(scratch, format="png"))


def picture(metrics: Sequence[dict], config: Config) -> Figure:
    """Draw a panel for each curve that the run has, with the curve's last value. The
    best top-1 is marked."""
    shown = [curve for curve in CURVES if not curve.beside and points(metrics, curve.key)[0]]
    model = config.student.model if config.student else ""
    title = (
        f"{model}, {labels_of(config)} labels: {metrics[-1]['epoch'] + 1} of "
        f"{config.train.epochs} epochs"
    )
    figure, places = small_multiples(len(shown), title)
    for curve, axes in zip(shown, places, strict=True):
        together = [
            curve,
            *(o for o in CURVES if o.beside == curve.key and points(metrics, o.key)[0]),
        ]
        for part, colour in zip(together, COLOURS, strict=False):
            line(
                axes,
                *points(metrics, part.key),
                color=colour,
                label=part.among or part.name,
            )
        note = f"last {points(metrics, curve.key)[1][-1]:.4g}"
        if curve.key == "val_top1":
            epoch, top1 = best_of(metrics)
            axes.plot(epoch, top1, marker="o", markersize=6, color=COLOURS[0])
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
    """Return rows and columns for ``count`` panels, one panel at least."""
    rows = 1 if count <= 3 else 2
    return rows, math.ceil(count / rows)


def small_multiples(count: int, title: str, head: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels, and the panels.

    head: inches to leave free below the title. Margins are fixed, since matplotlib's
    layouts double the time.
    """
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


def line(axes: Axes, epochs: list[int], values: list[float], **style: Any) -> None:
    """Draw a curve. With 40 points or fewer the points are marked, so that a single
    point can be seen too."""
    axes.plot(
        epochs,
        values,
        linewidth=1.4,
        marker="." if len(epochs) <= 40 else None,
        markersize=4,
        **style,
    )


def furnish(axes: Axes, curve: Curve, span: tuple[int, int], note: str = "") -> None:
    """Add title, note, axis labels and ticks to a panel.

    The x axis shows ``span`` in whole epochs. The y axis is logarithmic where the
    values fall far (``FAR``). Percentages stay within 0 … 100 %.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    # With y given, matplotlib needn't look for room.
    axes.set_title(curve.name, loc="left", fontsize=10, y=1.0)
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
