"""Compare both stages on busy cores with the same on free cores, and torch's threads
that give way with threads that spin as torch leaves them."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product

from parts import CLASSES, CPU, Figure, Place
from support.stages import drawn_crops, scan

from pipeline.config_file import load as read_recipe
from pipeline.demo import write_digits
from pipeline.models.weights import load, load_teachers
from pipeline.runtime.waiting import LOOK, giving_way
from pipeline.training.loop import Run

WORK = (0, 1, len(os.sched_getaffinity(0)))  # processes beside the run


@contextmanager
def other_work() -> Iterator[Callable[[int], None]]:
    """Hold a process for each core that counts for ever. Yields a function that lets
    a number of them run, and stops the others."""
    several = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in os.sched_getaffinity(0)
    ]

    def let(running: int) -> None:
        for i, process in enumerate(several):
            process.send_signal(signal.SIGCONT if i < running else signal.SIGSTOP)

    try:
        let(0)
        yield let
    finally:
        for process in several:
            process.kill()
            process.wait()


def rate(run: Run, least: float) -> float:
    """Return the images that a run trains on in a second, over at least ``least``
    seconds and two steps, after a time in which the cores are looked at."""
    begun, until, steps, seen = time.perf_counter(), 0.0, 0, 0
    while True:
        with run.replay.epoch(0) as batches:
            for batch in batches:
                run._step(batch)
                now = time.perf_counter()
                if not until:
                    if now > begun + 3 * LOOK:
                        begun, until = now, now + least
                    continue
                steps, seen = steps + 1, seen + len(batch)
                if now > until and steps > 1:
                    return seen / (now - begun)


def compared(name: str, measure: Callable[[], float], repeats: int, what: str) -> Iterator[Figure]:
    """Measure a rate beside each amount of other work, with threads that give way and
    with threads that spin, in turn."""
    conditions = list(product((True, False), WORK))
    found: dict[tuple[bool, int], list[float]] = {each: [] for each in conditions}
    with other_work() as let:
        measure()
        for _ in range(repeats):
            for gives_way, work in conditions:
                let(work)
                with giving_way(CPU) if gives_way else nullcontext():
                    found[gives_way, work].append(measure())
    middle = {each: statistics.median(rates) for each, rates in found.items()}
    for work in WORK:
        pairs = zip(found[True, work], found[False, work], strict=True)
        beside = f"beside {work} process{'es' * (work > 1)}" if work else "on free cores"
        yield Figure(
            f"{name}, {beside}: giving way / spinning",
            [a / b for a, b in pairs],
            None,
            f"{middle[True, work]:,.3g} and {middle[False, work]:,.3g} {what}; "
            f"{middle[True, work] / middle[True, 0]:.2f} and "
            f"{middle[False, work] / middle[False, 0]:.2f} of those on free cores",
        )


def on_busy_cores(place: Place) -> Iterator[Figure]:
    digits = place.folder / "digits"
    write_digits(digits)
    names = [str(digit) for digit in range(10)]
    images = scan(digits / "train", names, order_seed=0)
    for model in ("test_efficientnet", "resnet10t"):
        recipe = read_recipe(
            "demo_digits",
            {"student.model": model, "train.labels": "hard", "train.discriminator": None},
            [],
        )
        source = drawn_crops(images, names, recipe.crops, 1, (len(images),) * 2)
        run = place.training(
            recipe, source, digits / "train", load(recipe.student, class_names=names, image_size=32)
        )
        yield from compared(
            f"demo's {model}", lambda run=run: rate(run, 2.0), place.repeats, "images/s in training"
        )
        run.replay.close()
    config = place.config(train={"labels": "hard", "discriminator": None})
    found = scan(place.few, CLASSES, exif="ignore", order_seed=0)
    source = drawn_crops(found, CLASSES, config.crops, 1, (len(found),) * 2)
    run = place.training(
        config, source, place.few, load(config.student, classes=1000, image_size=224)
    )
    yield from compared(
        place.extent.student, lambda: rate(run, 4.0), place.repeats, "images/s in training"
    )
    run.replay.close()
    config = place.config(
        teachers=place.teachers, crops={"views": 1}, store={"batch_size": 64, "shard_rows": 64}
    )
    teachers = load_teachers(config.teachers, CPU)
    empty = place.empty(config, place.few, teachers)
    yield from compared(
        " + ".join(place.extent.teachers),
        lambda: len(found) / place.labelled(config, place.few, empty, teachers)[0],
        place.repeats,
        "crops/s in labelling",
    )
