"""Measure how fast both stages are on a GPU: ratios of two timings in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from finding import Bench, Finding
from parts import CLASSES, bare_steps, of_a_pass, seconds, stored
from right import crops_of
from support.stages import crop_renderer, drawn_crops

from pipeline.labelling.cost import estimate, flops
from pipeline.models.model import Model, ensemble
from pipeline.models.weights import load, load_teachers
from pipeline.render.renderer import CropRenderer
from pipeline.runtime.precision import fixed_shapes

AIM = "≥ 0.97 is the aim"  # for each stage, beside its models alone
LEAST = 2.0  # seconds that decoding is timed for, at least


def bare_seconds(work: Callable[[], object]) -> float:
    """Time a call three times after a first call, and return the least seconds."""
    work()
    return min(seconds(work) for _ in range(3))


def noise(bench: Bench) -> dict[int, torch.Tensor]:
    return {
        bench.size: torch.randint(
            256, (bench.batch, bench.size, bench.size, 3), dtype=torch.uint8, device=bench.device
        )
    }


def teachers_alone(bench: Bench, teachers: list[Model], precision: str) -> float:
    """Measure crops a second of teachers that have nothing to wait for."""
    crops = noise(bench)
    with fixed_shapes():
        return bench.batch / bare_seconds(
            lambda: ensemble(teachers, crops, precision, batch_size=bench.batch)
        )


def names(bench: Bench) -> str:
    return " + ".join(bench.extent.teachers)


def stage_one(bench: Bench) -> Iterator[Finding]:
    """Compare generate-labels with its bare teachers, for each decoder."""
    for backend in bench.backends():
        config = bench.config(
            **bench.settings(
                teachers=bench.teachers,
                crops={"views": 4},
                store={"precision": bench.half},
                render={"backend": backend},
            )
        )
        teachers = load_teachers(config.teachers, bench.device)
        empty = bench.empty(config, bench.many, teachers)
        rates = [teachers_alone(bench, teachers, bench.half)]
        took, _ = bench.labelled(config, bench.many, empty, teachers)
        rates.append(teachers_alone(bench, teachers, bench.half))
        crops = 4 * bench.extent.photographs * bench.extent.copies
        detail = {
            "crops": crops,
            "crops_per_second": crops / took,
            "bare": rates,
            "precision": bench.half,
        }
        yield Finding(
            f"stage one / bare {names(bench)}, decoded on {backend}",
            crops / took / statistics.mean(rates),
            AIM,
            None,
            detail,
        )


def teachers(bench: Bench) -> Iterator[Finding]:
    """Time the paper's teachers alone in each precision, and with cuDNN's own choice of
    algorithms."""
    models = load_teachers(
        bench.config(**bench.settings(teachers=bench.teachers)).teachers, bench.device
    )
    gflop = sum(flops(name, bench.size)[0] for name in bench.extent.teachers) / 1e9
    crops, rates = noise(bench), {}
    for precision in ("float32", "tf32", "bfloat16", "float16") if bench.gpu else ("float32",):
        rates[precision] = teachers_alone(bench, models, precision)
        detail = {
            "each": {m.name: round(teachers_alone(bench, [m], precision), 1) for m in models},
            "TFLOP/s": gflop * rates[precision] / 1e3,
        }
        yield Finding(
            f"crops/s of {names(bench)} alone, {precision}", rates[precision], detail=detail
        )
    best = bench.half if bench.gpu else "float32"
    untried = bench.batch / bare_seconds(
        lambda: ensemble(models, crops, best, batch_size=bench.batch)
    )
    yield Finding(
        "cuDNN trying its algorithms / its own choice",
        rates[best] / untried,
        detail={"precision": best, "own choice": untried},
    )


def compiled(bench: Bench) -> Iterator[Finding]:
    """Compare compiled teachers with eager ones: speed and labels."""
    models = load_teachers(
        bench.config(**bench.settings(teachers=bench.teachers)).teachers, bench.device
    )
    fast, crops = [model.compiled_teacher(bench.half) for model in models], noise(bench)
    with fixed_shapes():
        first = seconds(lambda: ensemble(fast, crops, bench.half, batch_size=bench.batch))
    one, other = (
        ensemble(several, crops, bench.half, batch_size=bench.batch)[0]
        for several in (models, fast)
    )
    eager, quick = (
        teachers_alone(bench, models, bench.half),
        teachers_alone(bench, fast, bench.half),
    )
    detail = {
        "crops_per_second": quick,
        "eager": eager,
        "seconds_to_compile": first,
        "tv": float((one - other).abs().sum(dim=1).max()) / 2,
    }
    yield Finding(f"compiled / eager, {names(bench)}, {bench.half}", quick / eager, detail=detail)


def stage_two(bench: Bench) -> Iterator[Finding]:
    """Compare train-student with its bare step on data in the device's memory, and with
    the paper's way of training, which asks live teachers."""
    config = bench.config(**bench.settings())
    source = stored(bench, bench.many, config)
    run = bench.training(
        config,
        source,
        bench.many,
        load(config.student, classes=1000, image_size=bench.size).to(bench.device),
    )
    with run.replay.epoch(0) as batches:
        memory = [
            (batch.pixels[bench.size], run.targets(batch).soft)
            for batch, _ in zip(batches, range(4), strict=False)
        ]
    model = load(config.student, classes=1000, image_size=bench.size).to(bench.device)
    optimizer = torch.optim.SGD(
        model.module.parameters(), lr=0.01, momentum=0.9, fused=bench.gpu or None
    )
    model.module.train()
    bare = partial(bare_steps, model, optimizer, memory, config.train.precision)
    rows = sum(len(p) for _, p in memory)
    with fixed_shapes():
        rates = [rows / bare_seconds(bare)]
        of_a_pass(run)  # the first pass makes threads and buffers
        taken = of_a_pass(run)
        rates.append(rows / bare_seconds(bare))
    images = len(source.images.usable)
    detail = {
        "images_per_second": images / taken,
        "bare": rates,
        "precision": config.train.precision,
        "batch": bench.batch,
    }
    yield Finding(
        f"stage two / bare step of {bench.extent.student}",
        images / taken / statistics.mean(rates),
        AIM,
        None,
        detail,
    )
    run.replay.close()
    yield from online(bench, images / taken)


def online(bench: Bench, stored_rate: float) -> Iterator[Finding]:
    """Compare a step with live teachers with the step from a store. stored_rate: images
    a second of the step from a store."""
    live = bench.config(
        **bench.settings(
            teachers=bench.teachers, store={"precision": bench.half}, train={"online": True}
        )
    )
    models = load_teachers(live.teachers, bench.device)
    found = bench.manifest
    drawn = drawn_crops(
        found, CLASSES, live.crops.model_copy(update={"views": 2}), 2, (len(found),) * 2
    )
    run = bench.training(
        live,
        drawn,
        bench.many,
        load(live.student, classes=1000, image_size=bench.size).to(bench.device),
        models,
    )
    with fixed_shapes():
        rate = len(found.usable) / of_a_pass(run)
    run.replay.close()
    work = estimate(live)
    allowed = (work["teacher_gflop_per_crop"] + work["student_gflop_per_crop"]) / work[
        "student_gflop_per_crop"
    ]
    detail = {
        "images_per_second": rate,
        "stored": stored_rate,
        "of floating-point operations": allowed,
    }
    yield Finding(
        f"online step / stored one, {bench.extent.student}",
        stored_rate / rate,
        f"about {allowed:.2g}",
        None,
        detail,
    )


def decoding(bench: Bench) -> Iterator[Finding]:
    """Measure crops a second of the renderer alone, for one and several views from one
    decode."""
    n = bench.batch
    blobs = [bench.encoded[i % len(bench.encoded)] for i in range(n)]
    boxes, flips = crops_of(blobs, 8)
    for backend in bench.backends():
        rates = {}
        for views in (1, 2, 4, 8):
            renderer = crop_renderer(
                [bench.size],
                views,
                n,
                interpolation="bilinear",
                exif="ignore",
                backend=backend,
                pinned=bench.gpu,
            )

            def work(renderer: CropRenderer = renderer, views: int = views) -> None:
                renderer(blobs, boxes[:views], flips[:views])

            work()
            least = LEAST if bench.gpu else 0.1
            calls = max(1, round(least / max(seconds(work), 1e-9)))
            rates[views] = (
                calls
                * views
                * n
                / seconds(lambda work=work, calls=calls: [work() for _ in range(calls)])
            )
        detail = {f"{views} views": rate for views, rate in rates.items()}
        size = float(np.mean([len(blob) for blob in blobs]))
        yield Finding(
            f"crops/s of the {backend} loader alone, one view a decode",
            rates[1],
            detail=detail | {"bytes": size},
        )
