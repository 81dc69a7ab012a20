"""Measure how well many workers share one store: the time until the last shard beside
the ideal, what claims cost, and whether a worker starves.

    python tests/bench/workers.py                       # 64 workers, four minutes, 3 GB
    python tests/bench/workers.py --workers 8 --seconds 0.05 --out workers.json

The workers are real processes that claim, write and wait as generate-labels does. Only
images and teachers are stand-ins: nothing is read or rendered, and a forward pass is a
sleep of ``--seconds``, so that 64 workers fit on two cores. A unit of work has 64
forward passes. "uneven" gives a quarter of the workers half the speed. The ideal is the
sum of all sleeps, divided by the sum of the workers' speeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import machine
from support.small import toy_provenance

from cache import create, verify, writer
from cache.format.codec import CODECS, DEFAULT
from cache.format.manifest import USABLE, Images
from cache.writer import StoreWriter
from pipeline.config import Config
from pipeline.labelling import generate, stream
from pipeline.labelling.free_units import FreeUnits
from pipeline.labelling.inputs import Labelling
from pipeline.labelling.shares import Share
from pipeline.runtime import progress
from pipeline.runtime.execution import Execution

CLASSES, ROWS, BATCH, DECODES = 10, 256, 16, 4
SHARDS = 32  # of a view
FORWARDS = ROWS // BATCH * DECODES  # of a unit
LINE = (
    "{shares:>6} {speeds:>7}: {seconds:7.1f} s, ideal {ideal_seconds:7.1f}, ratio {ratio:.3f}; "
    "claims {claims_ms_per_shard:.1f} ms a shard ({claims_cpu_ms_per_shard:.2f} of CPU); "
    "{fewest_shards} to {most_shards} shards a worker"
)
SLOW = 0.5  # speed of every fourth worker of an uneven crew


def make_store(path: Path, views: int) -> None:
    """Create an empty store of made-up images."""
    n, codec = SHARDS * ROWS, CODECS[DEFAULT]
    images = Images(
        np.array([f"{i % CLASSES}/{i:06d}.jpg" for i in range(n)], object),
        np.full(n, 100_000),
        np.zeros((n, 32), np.uint8),
        np.full(n, 400, np.int32),
        np.full(n, 500, np.int32),
        (np.arange(n) % CLASSES).astype(np.int32),
        np.full(n, USABLE, np.uint8),
        np.full(n, "", object),
    )
    attributes = {
        "codec": codec.describe(),
        "provenance": toy_provenance(codec, images, {"chunk_rows": ROWS, "shard_rows": ROWS}),
        "class_names": [str(c) for c in range(CLASSES)],
    }
    create.create(path, images=images, views=views, attributes=attributes)


class NoReader:
    """Stands in for the reader of images."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Callable[[Sequence[int]], list[bytes]]:
        return lambda rows: [b""] * len(rows)

    def __exit__(self, *_: object) -> None:
        pass


class NoRenderer:
    """Stands in for the renderer of crops."""

    def __init__(self, sizes: object, views: int, *_: object, **__: object) -> None:
        self.views = views

    def __call__(self, filled: Sequence[bytes], *_: object) -> list[dict[int, torch.Tensor]]:
        return [{1: torch.zeros(len(filled), 1, 1, 3, dtype=torch.uint8)}] * self.views

    def close(self) -> None:
        pass


class Stopwatch:
    """Adds up the time of some calls, and of the threads that made them."""

    def __init__(self) -> None:
        self.seconds, self.cpu, self.calls = 0.0, 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        begun, cpu = time.perf_counter(), time.thread_time()
        yield
        self.seconds += time.perf_counter() - begun
        self.cpu += time.thread_time() - cpu


def work(path: Path, share: Share, forward: float, out: Path, start: Any) -> None:
    """Label a share, and write down how that went."""
    torch.set_num_threads(1)
    progress.silence()
    claims, begun = Stopwatch(), [0.0]
    real_claim, real_first = writer.claim, FreeUnits._first
    pattern = torch.full((BATCH, CLASSES), 1 / CLASSES)

    def label(teachers: object, pixels: dict, *_: object, **__: object) -> tuple:
        begun[0] = begun[0] or time.time()
        time.sleep(forward)
        return pattern[: len(pixels[1])], pattern[: len(pixels[1])]

    @contextmanager
    def timed_claim(*names: Any) -> Iterator[Any]:
        held = real_claim(*names)
        with claims.running():
            mine = held.__enter__()
        claims.calls += len(mine)
        try:
            yield mine
        finally:
            with claims.running():
                held.__exit__(None, None, None)

    def timed_first(self: FreeUnits, busy: set[str]) -> Any:
        with claims.running():
            return real_first(self, busy)

    writer.claim, FreeUnits._first = timed_claim, timed_first
    stream.ensemble, stream.CropRenderer, generate.Reader = label, NoRenderer, NoReader
    config = Config.model_validate(
        {
            "teachers": [{"model": "none"}],
            "store": {"batch_size": BATCH, "views_per_decode": DECODES},
        }
    )
    store = StoreWriter(path)
    start.wait()
    cpu = time.process_time()
    generate._fill(Labelling(config, None, [], Execution()), store, share, [])
    out.write_text(
        json.dumps(
            {
                "begun": begun[0],
                "claims_seconds": claims.seconds,
                "claims_cpu": claims.cpu,
                "claims": claims.calls,
                "cpu": time.process_time() - cpu,
            }
        )
    )


def measure(folder: Path, workers: int, views: int, seconds: float, how: tuple[bool, bool]) -> dict:
    """Fill a store with a crew of workers. how: open shares, even speeds."""
    opened, even = how
    path = folder / f"{opened}{even}.zarr"
    make_store(path, views)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    speeds = [SLOW if not even and i % 4 == 3 else 1.0 for i in range(workers)]
    crew = [
        context.Process(
            target=work,
            args=(
                path,
                Share(i, workers, views_per_decode=DECODES, open=opened),
                seconds / speed,
                folder / f"{opened}{even}{i}.json",
                start,
            ),
        )
        for i, speed in enumerate(speeds)
    ]
    for process in crew:
        process.start()
    time.sleep(2.0 + workers / 20)  # until all wait for the start
    start.set()
    for process in crew:
        process.join()
    found = [json.loads((folder / f"{opened}{even}{i}.json").read_text()) for i in range(workers)]
    verdict = verify.verify(path)
    assert verdict.sound and not verdict.missing
    ends = [file.stat().st_mtime for file in (path / "records" / "c").glob("*/*/0")]
    shards = views * SHARDS
    assert len(ends) == shards
    ideal = shards / DECODES * FORWARDS * seconds / sum(speeds)
    took = max(ends) - min(one["begun"] for one in found if one["begun"])
    claimed = [one["claims"] for one in found]
    return {
        "shares": "open" if opened else "fixed",
        "speeds": "even" if even else "uneven",
        "ideal_seconds": ideal,
        "seconds": took,
        "ratio": took / ideal,
        "claims_ms_per_shard": 1000 * sum(one["claims_seconds"] for one in found) / shards,
        "claims_cpu_ms_per_shard": 1000 * sum(one["claims_cpu"] for one in found) / shards,
        "cpu_ms_per_shard": 1000 * sum(one["cpu"] for one in found) / shards,
        "fewest_shards": min(claimed),
        "most_shards": max(claimed),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--units", type=int, default=6, help="units of work per worker")
    parser.add_argument("--seconds", type=float, default=0.125, help="of a forward pass")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args(arguments)
    views = max(1, round(chosen.workers * chosen.units / SHARDS)) * DECODES
    rows = []
    with tempfile.TemporaryDirectory(prefix="workers.") as folder:
        for how in ((False, True), (True, True), (False, False), (True, False)):
            row = measure(Path(folder), chosen.workers, views, chosen.seconds, how)
            rows.append(row)
            print(LINE.format(**row), flush=True)
    if chosen.out:
        chosen.out.write_text(
            json.dumps({"machine": machine(), "workers": chosen.workers, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
