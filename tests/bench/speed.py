"""Measure how near both stages come to their bare arithmetic: ratios of two timings in
one run on one machine.

    make bench                                          # some fifteen minutes
    python tests/bench/speed.py --only stand-in online   # by words of their names
    python tests/bench/speed.py --out speed.json         # JSON too

A figure is the median of the ratios of some pairs, A B A B …, with the least and the
greatest ratio. Photographs are cut from scikit-learn's two samples, to about the size
of ImageNet's. Weights are random, which doesn't matter to speed. Work done once at a
start (reading the manifest, loading models, the first use of each thread) isn't
counted. Stage one is timed from its first rendered batch to its last record.

A stand-in is a model that does nothing for 1.25 times as long as the loader alone takes
for a batch, as an accelerator would seem to the CPU. A machine without an accelerator
can so measure the loss between the loader and a fast device. "Serial" is the same work
with nothing done beside anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import scale
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from busy import on_busy_cores
from loaders import the_loader
from machine import machine
from parts import (
    CLASSES,
    CPU,
    SMALL,
    Extent,
    Figure,
    Place,
    bare_steps,
    mean_seconds,
    of_a_pass,
    one_thread,
    pairs,
    seconds,
    serial,
    stand_in,
    stored,
)
from support.stages import drawn_crops, make_replay, stored_labels
from support.stores import write

from cache import LabelStore
from cache.writer import StoreWriter
from pipeline.labelling.cost import estimate
from pipeline.models.model import Model, ensemble
from pipeline.models.weights import load, load_teachers
from pipeline.runtime import progress
from pipeline.runtime.malloc import keep_freed_memory
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.training.batches import Batching

SLOWER = 1.25


def left_by(loader: float, found: list[tuple[float, float]]) -> str:
    """Tell the best ratio possible beside a loader that takes ``loader`` seconds of one
    core, where the model wants all cores."""
    bare = statistics.median(a for a, _ in found)
    return (
        "the loader shares the cores, which allows "
        f"{bare / (bare + loader / len(os.sched_getaffinity(0))):.3f}"
    )


def busy(work: float, took: float) -> str:
    """Tell how busy all cores were with ``work`` seconds of this process's threads: a
    stand-in leaves them to the loader, coding and writing."""
    share = work / (took * len(os.sched_getaffinity(0)))
    return f"the cores are {100 * min(1.0, share):.0f} % busy"


def the_teachers(place: Place) -> Iterator[Figure]:
    config = place.config(
        teachers=place.teachers,
        crops={"views": 2},
        store={"batch_size": 64, "shard_rows": 64, "views_per_decode": 2},
    )
    teachers = load_teachers(config.teachers, CPU)
    empty = place.empty(config, place.few, teachers)
    with ExitStack() as stack:
        run, units = place.labeller(config, place.few, empty, teachers, stack)
        begun = time.process_time()
        pieces = [pixels for views in place.rendered(run, units) for pixels in views]
        loader = time.process_time() - begun
    crops = sum(len(pixels[teachers[0].image_size]) for pixels in pieces)

    def bare() -> float:
        return seconds(
            lambda: [ensemble(teachers, pixels, "float32", batch_size=64) for pixels in pieces]
        )

    bare()
    found = pairs(
        bare, lambda: place.labelled(config, place.few, empty, teachers)[0], place.repeats
    )
    rates = [statistics.median(crops / took for took in side) for side in zip(*found, strict=True)]
    detail = (
        f"{' + '.join(place.extent.teachers)}, {crops} crops: {rates[1]:.1f} of "
        f"{rates[0]:.1f} crops/s; {left_by(loader, found)}"
    )
    yield Figure("stage one / bare teachers", [a / b for a, b in found], 0.97, detail)


def compilation(place: Place) -> Iterator[Figure]:
    """Compare a teacher with the same, compiled (store.compile), at one batch size."""
    (teacher, _) = load_teachers(place.config(teachers=place.teachers).teachers, CPU)
    fast = teacher.compiled_teacher("float32")
    pixels = {
        teacher.image_size: torch.randint(
            0, 256, (64, teacher.image_size, teacher.image_size, 3), dtype=torch.uint8
        )
    }

    def of(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
        return ensemble([model], pixels, "float32")

    apart = float((of(teacher)[0] - of(fast)[0]).abs().sum(dim=1).max()) / 2
    found = pairs(
        lambda: seconds(lambda: of(teacher)),
        lambda: seconds(lambda: of(fast)),
        2 * place.repeats + 1,
    )
    yield Figure(
        "teacher / the same, compiled",
        [a / b for a, b in found],
        None,
        f"seconds; {teacher.name}, batches of 64; labels apart {apart:.1g} in total variation",
    )


def the_stand_in_teachers(place: Place) -> Iterator[Figure]:
    config = place.config(crops={"views": 4}, store={"batch_size": 64, "shard_rows": 512})
    empty = place.empty(config, place.many, [stand_in(0)])

    def loading() -> tuple[float, int]:
        """Return the seconds of the loader alone for a batch of one view, and the
        number of batches."""
        with ExitStack() as stack:
            run, units = place.labeller(config, place.many, empty, [stand_in(0)], stack)
            begun = time.perf_counter()
            made = sum(len(views) for views in place.rendered(run, units))
            return (time.perf_counter() - begun) / made, made

    ours, pixels = [], {224: torch.zeros(64, 224, 224, 3, dtype=torch.uint8)}
    with one_thread():
        loading()
        for _ in range(place.repeats):
            alone, batches = loading()
            teacher = stand_in(alone * SLOWER)
            bare = batches * mean_seconds(
                partial(ensemble, [teacher], pixels, "float32", batch_size=64)
            )
            begun = time.process_time()
            took = place.labelled(config, place.many, empty, [teacher])[0]
            work = time.process_time() - begun
            ours.append(bare / took)
        with serial():
            theirs = [bare / place.labelled(config, place.many, empty, [teacher])[0]]
    detail = (
        f"{batches} batches of 64 at 224 px, {64 / alone:,.0f} crops/s from the loader alone; "
        f"{busy(work, took)}"
    )
    yield Figure("stage one / stand-in teacher", ours, 0.95, detail)
    yield Figure(
        "stage one / the same, serial", theirs, None, "must be below 0.95, or this measures nothing"
    )


def the_student(place: Place) -> Iterator[Figure]:
    config = place.config()
    source = stored(place, place.few, config)
    run = place.training(
        config, source, place.few, load(config.student, classes=1000, image_size=224)
    )
    bare_model = load(config.student, classes=1000, image_size=224)
    optimizer = torch.optim.SGD(bare_model.module.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):  # the first pass also makes threads and buffers
        begun = time.process_time()
        with run.replay.epoch(0) as batches:
            labelled = [(batch, run.targets(batch).soft) for batch in batches]
        loader = time.process_time() - begun

    memory = [(batch.pixels[224], p) for batch, p in labelled]
    bare_model.module.train()
    bare = partial(bare_steps, bare_model, optimizer, memory)
    bare()
    found = pairs(lambda: seconds(bare), lambda: of_a_pass(run), place.repeats)
    rows = len(source.images.usable)
    rates = [statistics.median(rows / took for took in side) for side in zip(*found, strict=True)]
    yield Figure(
        "stage two / bare step",
        [a / b for a, b in found],
        0.97,
        f"{place.extent.student}, batches of 32: {rates[1]:.1f} of {rates[0]:.1f} images/s; "
        f"{left_by(loader, found)}",
    )
    reading = min(seconds(lambda: list(run.replay._windows(0))) for _ in range(5))
    decoding = min(seconds(lambda: [run.targets(batch) for batch, _ in labelled]) for _ in range(5))
    step = min(a for a, _ in found)
    yield Figure(
        "bare step / label path of it",
        [step / (reading + decoding)],
        100,
        f"{1e6 * reading / rows:.0f} µs an image to read and {1e6 * decoding / rows:.0f} to "
        f"decode, {1e3 * step / rows:.1f} ms to train on",
    )


def the_stand_in_student(place: Place) -> Iterator[Figure]:
    config = place.config(train={"batch_size": 64})
    source = stored(place, place.many, config)
    loader = make_replay(
        source, place.many, sizes=[224], batch_size=64, seed=0, rendering=config.render
    )

    def loading() -> float:
        with serial(), loader.epoch(0) as batches:
            return seconds(lambda: sum(1 for _ in batches)) / len(loader.sizes)

    ours = []
    with one_thread():
        loading()
        with loader.epoch(0) as batches:
            batch = next(batches)
        for _ in range(place.repeats):
            alone = loading()
            run = place.training(config, source, place.many, stand_in(alone * SLOWER))
            bare = len(loader.sizes) * mean_seconds(partial(run._step, batch))
            begun = time.process_time()
            took = of_a_pass(run)
            work = time.process_time() - begun
            ours.append(bare / took)
        with serial():
            theirs = [bare / of_a_pass(run)]
    detail = (
        f"{len(loader.sizes)} batches of 64 at 224 px, "
        f"{64 / alone:,.0f} images/s from the loader alone; {busy(work, took)}"
    )
    yield Figure("stage two / stand-in student", ours, 0.95, detail)
    yield Figure(
        "stage two / the same, serial", theirs, None, "must be below 0.95, or this measures nothing"
    )


def online(place: Place) -> Iterator[Figure]:
    config = place.config()
    source = stored(place, place.few, config)
    plain = place.training(
        config, source, place.few, load(config.student, classes=1000, image_size=224)
    )
    live = place.config(teachers=place.teachers, store={"batch_size": 32}, train={"online": True})
    teachers = load_teachers(live.teachers, CPU)
    drawn = drawn_crops(source.images, CLASSES, live.crops, 1, (len(source.images),) * 2)
    asking = place.training(
        live, drawn, place.few, load(live.student, classes=1000, image_size=224), teachers
    )
    of_a_pass(plain)
    found = pairs(lambda: of_a_pass(asking), lambda: of_a_pass(plain), place.repeats)
    work = estimate(live)
    allowed = (work["teacher_gflop_per_crop"] + work["student_gflop_per_crop"]) / work[
        "student_gflop_per_crop"
    ]
    yield Figure(
        "online step / stage two's",
        [a / b for a, b in found],
        None,
        f"seconds; {place.extent.student} taught by {' + '.join(place.extent.teachers)}. Of "
        f"floating-point operations {allowed:.2f}",
    )


def labels(place: Place) -> Iterator[Figure]:
    """Compare reading the rows of an epoch in training order with reading a file per
    image as FKD keeps it: boxes, flips and top-5 labels of 500 crops, of which one crop
    is used."""
    n, files = place.extent.rows, place.extent.files
    path = place.folder / "labels.zarr"
    _store_of(path, n)
    source = stored_labels(LabelStore.open(path), 1)
    reader = scale.Unrendered(source, [32], Batching(512, 0))
    folder = place.folder / "fkd"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    for i in range(files):
        top = torch.rand(500, 5, generator=rng), torch.randint(0, 1000, (500, 5), generator=rng)
        torch.save(
            (torch.rand(500, 4, generator=rng), torch.rand(500, generator=rng) < 0.5, top),
            folder / f"{i}.tar",
        )
    order = np.random.default_rng(0).permutation(files)

    def ours() -> None:
        with reader.epoch(0) as batches:
            assert sum(batches) == len(source.images.usable)

    def theirs() -> None:
        for i in order:
            boxes, flips, (values, classes) = torch.load(folder / f"{i}.tar", weights_only=True)
            _ = boxes[7], flips[7], values[7], classes[7]

    ours(), theirs()
    timed = pairs(
        lambda: seconds(theirs) / files,
        lambda: seconds(ours) / len(source.images.usable),
        place.repeats,
    )
    each = [statistics.median(side) for side in zip(*timed, strict=True)]
    yield Figure(
        "a file per image (FKD) / labels of an epoch",
        [a / b for a, b in timed],
        None,
        f"seconds a row: {1e6 * each[0]:.0f} µs and {1e6 * each[1]:.1f} µs, "
        f"{1 / each[1]:,.0f} rows/s, 1,000 classes",
    )


def _store_of(path: Path, n: int) -> None:
    """Make a store of n labels that are all different."""
    policy = scale.create(path, scale.manifest(n), 1)
    writer = StoreWriter(path)
    store = writer.store
    plan = CropSampler(policy, store.images, store.shard_rows)
    for shard in range(store.shards):
        rows = np.arange(*store.shard_slice(shard).indices(n))
        codes = scale.some_codes(len(rows), shard)
        codes[store.images.status[rows] != 0] = 0
        with writer.claimed([0], shard):
            write(writer, 0, shard, codes, *plan.crops(0, rows))


MEASUREMENTS = {
    "stage one, teachers": the_teachers,
    "stage one, compiled": compilation,
    "stage one, stand-in": the_stand_in_teachers,
    "stage two, student": the_student,
    "stage two, stand-in": the_stand_in_student,
    "online": online,
    "loader": the_loader,
    "labels": labels,
    "busy cores": on_busy_cores,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORDS",
        help=f"of a name: {', '.join(MEASUREMENTS)}",
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs a figure")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny models and few images: whether it works; the figures mean nothing",
    )
    given = parser.parse_args()
    for words in given.only:
        if not any(words in name for name in MEASUREMENTS):
            parser.error(
                f"--only {words}: no measurement has that in its name; there are "
                f"{', '.join(MEASUREMENTS)}"
            )
    chosen = [
        measure
        for name, measure in MEASUREMENTS.items()
        if any(words in name for words in given.only)
    ]
    keep_freed_memory()
    progress.silence()
    about = machine()
    print(
        f"{about['processor']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}; torch "
        f"{about['torch']}; {about['date']}\n"
    )
    print("| ratio | median | aim | |\n|---|---|---|---|")
    figures = []
    with tempfile.TemporaryDirectory(prefix="speed.") as folder:
        place = Place(Path(folder), given.repeats, SMALL if given.small else Extent())
        for measure in chosen:
            for figure in measure(place):
                print(figure.row(), flush=True)
                figures.append(figure)
    if given.out:
        given.out.write_text(
            json.dumps(
                {"machine": about, "figures": [asdict(figure) for figure in figures]}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
