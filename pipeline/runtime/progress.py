"""Show the progress of long work on stderr, with rate and time left: a bar on a
terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cache.errors import printable
from cache.system.signals import check

LOG_SECONDS = 30.0  # between two lines in a log
_speaks = True
_line: Callable[[str], object] | None = None  # takes lines, instead of stderr
_count: Callable[[Progress], object] | None = None


def divert(line: Callable[[str], object], count: Callable[[Progress], object]) -> None:
    """Hand this process's lines and progress to functions, which tell them to another
    process, instead of printing them."""
    global _line, _count
    _line, _count = line, count


def silence() -> None:
    """Let this process print nothing, since another process prints the same."""
    global _speaks
    _speaks = False


def speaks() -> bool:
    """Return True unless ``silence`` was called."""
    return _speaks


class Progress:
    """Shows how many of ``total`` units are done.

    Use it as a context::

        with Progress("training", 1000, "images") as progress:
            progress.advance(64, "loss 1.23")
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.elsewhere, self.note = 0, 0, ""
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        self.started = self.logged = time.monotonic()
        if _count:
            _count(self)
        elif _speaks and sys.stderr is not None and sys.stderr.isatty():
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, rate="", note="")
        return self

    def advance_elsewhere(self, n: int) -> None:
        """Count ``n`` more units as done by other processes since the start."""
        self.elsewhere += n
        if self.bar:
            self.bar.update(self.task, advance=n)

    def advance(self, n: int, note: str = "") -> None:
        """Count ``n`` more units as done, and show a note. Raises Stopped if a signal
        asked for it."""
        check()
        self.done += n
        self.note = note
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-9)
        if self.bar:
            self.bar.update(
                self.task,
                advance=n,
                rate=f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s",
                note=note,
            )
        elif _count:
            _count(self)
        elif _speaks and now - self.logged >= LOG_SECONDS:
            self.logged = now
            both = self.done + self.elsewhere
            left = duration((self.total - both) * (now - self.started) / both) if both else "?"
            others = f" here, {self.elsewhere:,} elsewhere," if self.elsewhere else ""
            _print(
                f"{self.what}: {self.done:,}{others} of {self.total:,} {self.unit}, {rate:,.1f}/s, "
                f"{left} left {note}".rstrip()
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()
        self.seconds = time.monotonic() - self.started


def say(message: str, *, anyway: bool = False) -> None:
    """Print a line for people on stderr, since stdout is for results. anyway: print it
    after ``silence`` too."""
    if _speaks or anyway:
        _print(printable(message))


def _print(line: str) -> None:
    """Print a line on stderr, in one write: several processes may share a log. A log
    that can't be written, since its disk is full, doesn't stop the work; a closed pipe
    does, as everywhere."""
    if _line:
        _line(line)
        return
    if sys.stderr is None:  # closed by the caller of a library
        return
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass


def duration(seconds: float) -> str:
    """Format seconds for people: 3723 → "1 h 02 min"; in days from 100 hours on."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 6000:
        return f"{minutes / 1440:,.0f} days"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def results() -> Console:
    """Return the console for results: stdout, as wide as the terminal. In a pipe or
    file, lines are not wrapped."""
    return Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 1000)
