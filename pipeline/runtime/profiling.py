"""Measure where the time of a stage goes, and advise what to change (--profile).

The thread that feeds the model sets the pace: it works, or it waits for crops or for
the writer. Work in other threads costs no time as long as this thread doesn't wait.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline.config import Config
from pipeline.runtime.precision import HALF
from pipeline.runtime.progress import duration
from pipeline.runtime.threads import threads_for

T = TypeVar("T")
MUCH = 0.1  # share of the time above which a wait is worth advice
_END: Any = object()
# Parts of a stage: first the parts of the thread that feeds the model, then the parts
# of other threads.
RENDERING = ("decode", "resize", "decode and resize")
LABELLING = (
    ("teachers", "wait for crops", "wait for the writer"),
    ("read", *RENDERING, "mix", "send", "code", "write"),
)
TRAINING = (
    (
        "labels and teachers",
        "forward and backward",
        "optimizer",
        "wait for crops",
        "validate",
        "save",
    ),
    ("labels", "read", *RENDERING, "mix", "send"),
)


class Clock:
    """Adds up seconds by part, in any thread.

    exact: wait for the GPU at the end of each part that runs the model. Otherwise such
    a part only starts work on the GPU, and the time of this work doesn't count. Waiting
    costs some speed, so it is for --profile.
    """

    def __init__(self, device: torch.device | None = None, *, exact: bool = False) -> None:
        self.exact = exact
        self.seconds: dict[str, float] = defaultdict(float)
        self.lock = threading.Lock()
        self.settle: Callable[[], object] = (
            torch.cuda.synchronize
            if exact and device is not None and device.type == "cuda"
            else lambda: None
        )
        self.begun = time.perf_counter()

    def begin(self) -> None:
        """Set all times to zero, and start to count."""
        self.seconds.clear()
        self.begun = time.perf_counter()

    @contextmanager
    def part(self, name: str, *, of_model: bool = False, among: int = 1) -> Iterator[None]:
        """Add the time of a block to a part. of_model: the block runs the model, so an
        exact clock waits for the GPU. among: so many threads share the part's work, and
        each adds its share of the time."""
        begun = time.perf_counter()
        try:
            yield
            if of_model:
                self.settle()
        finally:
            with self.lock:
                self.seconds[name] += (time.perf_counter() - begun) / among

    def waits(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and add the time of waiting for each item to the part
        ``name``."""
        items = iter(items)
        while True:
            with self.part(name):
                item = next(items, _END)
            if item is _END:
                return
            yield item


def report(clock: Clock, parts: tuple[tuple[str, ...], tuple[str, ...]], advice: str) -> list[str]:
    """Return a report, line by line.

    The parts of the thread that feeds the model add up to the whole time; the parts of
    other threads don't. advice: the last line.
    """
    whole = max(time.perf_counter() - clock.begun, 1e-9)
    feeding, beside = parts
    other = whole - sum(clock.seconds[name] for name in feeding)
    lines = [f"where {duration(whole)} went:"]
    lines += [
        _line(name, clock.seconds[name], whole) for name in feeding if clock.seconds[name]
    ] + [_line("the rest", other, whole)]
    lines += ["beside that, in other threads:"] + [
        _line(name, clock.seconds[name], whole) for name in beside if clock.seconds[name]
    ]
    return [*lines, advice]


def _line(name: str, seconds: float, whole: float) -> str:
    return f"  {name:22}{seconds:10.2f} s {100 * seconds / whole:6.1f} %"


def advice_on_labelling(clock: Clock, config: Config, device: torch.device) -> str:
    """Return a line of advice on stage one: its bottleneck, and how to make it
    faster."""
    seconds, worked = (
        clock.seconds,
        clock.seconds["teachers"]
        + clock.seconds["wait for crops"]
        + clock.seconds["wait for the writer"],
    )
    if seconds["wait for crops"] > MUCH * worked:
        more = []
        if config.store.views_per_decode < min(config.crops.views, 16):
            more.append(
                f"raise store.views_per_decode ({config.store.views_per_decode} of "
                f"{config.crops.views} views now)"
            )
        return _of_the_loader(clock, config, device, "the teachers wait", more, "a new store")
    if seconds["wait for the writer"] > MUCH * worked:
        if seconds["write"] > seconds["code"]:
            return (
                "the teachers wait for the disk: put --store on a faster one, or let several "
                "workers fill it"
            )
        return (
            "the teachers wait for coding: a codec of one byte a class (store.codec: pow8) is "
            "faster, for a new store"
        )
    more = ["set store.compile=true for a new store"] if not config.store.compile else []
    if device.type == "cuda" and config.store.precision not in HALF:
        more.append("store.precision=float16 for a new store")
    return "the teachers are the limit, the loader keeps up: " + _or(
        [*more, "use more GPUs or machines (torchrun, --worker)"]
    )


def advice_on_training(clock: Clock, config: Config, device: torch.device) -> str:
    """Return a line of advice on stage two: its bottleneck, and how to make it
    faster."""
    seconds = clock.seconds
    worked = sum(seconds[name] for name in TRAINING[0] if name not in ("validate", "save"))
    if seconds["wait for crops"] > MUCH * worked:
        more = []
        if config.train.crops_per_image == 1:
            more.append("show several crops of each decoded image (train.crops_per_image=4)")
        return _of_the_loader(
            clock, config, device, "the student waits", more, "a store that was made with it"
        )
    more = ["set train.compile=true"] if not config.train.compile else []
    if device.type == "cuda" and config.train.precision not in HALF:
        more.append("train.precision=bfloat16")
    return "the student is the limit, the loader keeps up: " + _or(
        [*more, "use more GPUs (torchrun)"]
    )


def _of_the_loader(
    clock: Clock, config: Config, device: torch.device, who: str, more: list[str], store: str
) -> str:
    seconds, now, most = clock.seconds, threads_for(config.render.threads), threads_for(None)
    # Decoding and resizing go on beside each other, on the same cores.
    rendering = sum(seconds[name] for name in RENDERING)
    if seconds["labels"] > seconds["read"] + rendering:
        return f"{who} for labels, which are read from the store: put --store on a faster disk"
    if seconds["read"] > rendering:
        return (
            f"{who} for crops, and reading the files takes most of that: put --data on a faster "
            "disk, or set render.threads higher"
        )
    if now < most:
        more = [f"set render.threads to {most} (now {now})", *more]
    if device.type == "cuda" and config.render.backend == "cpu":
        more.append(f"decode on the GPU (render.backend=gpu, with {store})")
    what = "resizing" if seconds["resize"] > seconds["decode"] else "decoding"
    return f"{who} for crops, and {what} takes most of that: " + _or(
        [*more, "give this process more cores"]
    )


def _or(several: list[str]) -> str:
    return several[0] if len(several) == 1 else f"{', '.join(several[:-1])}, or {several[-1]}"
