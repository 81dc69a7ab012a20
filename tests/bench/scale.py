"""Measure the cost of a growing label store: each step from opening it to reading an
epoch, on stores of 10^3 to 10^8 crops and of ImageNet × 180 views.

    python tests/bench/scale.py         # 15 to 30 minutes on two cores, 4 GB
    python tests/bench/scale.py --largest 6      # one or two minutes, 0.1 GB
    python tests/bench/scale.py --out scale.json

The claim has two parts. No step's cost per crop (or per image, where a step sees images
only) grows with the store, but for the logarithm in sorting the paths. A process's
memory grows with the images alone, not with the views.

Stores are real. schema.create makes them, StoreWriter writes view 0 with crops drawn by
the policy, records hold digests, and a sample is verified. The manifest is made up:
ImageNet's names, one file in a thousand unusable. So are the labels: 16 rows over and
over, which zstd packs into some 8 bytes a crop instead of some 450, so that 10^8 fit on
a disk. The other views hold copies of view 0's files under records of their own. The
cost of reading and keeping rows that differ is measured once, at 10^5 crops.

Steps run in processes of their own, forked after the imports. Figures are medians of
CPU time (all threads of a process), since other work on the machine disturbs it less.
Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.stages import store_facts, stored_labels
from support.stores import write

from cache import LabelStore, verify
from cache import create as create_module
from cache.format import schema
from cache.format.codec import CODECS, DEFAULT
from cache.format.manifest import USABLE, Images
from cache.writer import StoreWriter
from pipeline.config import CropPolicy
from pipeline.labelling.shares import Share
from pipeline.provenance.description import policy_of
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.sampling.epoch_order import epoch_windows
from pipeline.training.batches import Batching, Replay, Window

ROOT = Path(__file__).parents[2]
# log10 of crops → images, views
SIZES = {
    3: (1_000, 1),
    4: (5_000, 2),
    5: (20_000, 5),
    6: (100_000, 10),
    7: (500_000, 20),
    8: (1_281_167, 78),
}
IMAGENET = (1_281_167, 180)
BASE = "10^5"  # the size that ratios are to
CLASSES, PROTOTYPES = 1000, 16
DECODES = 4  # views that share a decode, as store.views_per_decode
SAMPLE = 8  # shards that are checked and verified
REPEATS, PATIENCE = 5, 20.0  # seconds after which no repeat follows, but for three at least

# A step prepares a store, and yields the function that is timed.
Step = Callable[[Path], AbstractContextManager[Callable[[], object]]]


def manifest(n: int) -> Images:
    """Make up a manifest of n files as ImageNet names them, in a random order."""
    rng = np.random.default_rng(n)
    order = rng.permutation(n)
    class_index = np.sort(rng.integers(0, CLASSES, n)).astype(np.int32)[order]
    folders = [f"n{1_440_764 + 13_517 * c:08d}" for c in range(CLASSES)]
    names = [
        f"{folders[c]}/{folders[c]}_{i}.JPEG"
        for c, i in zip(class_index.tolist(), order.tolist(), strict=True)
    ]
    status = (rng.random(n) < 1e-3).astype(np.uint8)
    height, width = (
        np.where(status == USABLE, rng.integers(200, 600, n), 0).astype(np.int32) for _ in range(2)
    )
    reason = np.where(status == USABLE, "", "damaged: image file is truncated").astype(object)
    return Images(
        np.array(names, object),
        rng.integers(5_000, 250_000, n),
        rng.integers(0, 256, (n, 32), dtype=np.uint8),
        height,
        width,
        class_index,
        status,
        reason,
    )


def some_codes(n: int, seed: int) -> np.ndarray:
    """Make up codes [n, columns] of distributions of some 1.2 nats, which zstd packs
    into 450 bytes a row. Labels of real teachers have 1.4 nats and take 440 bytes."""
    rng = np.random.default_rng(seed)
    p = np.empty((n, CLASSES), np.float32)
    for first in range(0, n, 1024):
        part = p[first : first + 1024]
        part[:] = rng.normal(0, 1, part.shape)
        part[np.arange(len(part)), rng.integers(0, CLASSES, len(part))] += rng.uniform(
            7, 14, len(part)
        )
        np.exp(part, out=part)
        part /= part.sum(axis=1, keepdims=True)
    return CODECS[DEFAULT].encode(p)


def create(path: Path, images: Images, views: int) -> CropPolicy:
    """Create an empty store, and return its crop policy."""
    codec, policy = CODECS[DEFAULT], CropPolicy(views=views)
    chunk_rows, shard_rows = schema.shard_rows_for(
        len(images), CLASSES, np.dtype(codec.dtype).itemsize
    )
    provenance = {
        "teachers": [
            {
                "model": "none",
                "image_size": 224,
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "weights": "0" * 64,
            }
        ],
        "crops": {
            "policy": "random-resized-crop",
            "tries": 10,
            **policy.model_dump(mode="json", exclude={"views", "cutmix"}),
        },
        "renderer": {"backend": "cpu"},
        "codec": codec.describe(),
        "compute": {"batch_size": 64, "precision": "float32", "device": "cpu"},
        "data": {
            "images": len(images),
            "usable": len(images.usable),
            "manifest": images.manifest_digest(),
            "classes": "",
        },
        "layout": {"chunk_rows": chunk_rows, "shard_rows": shard_rows},
    }
    attributes = {
        "codec": codec.describe(),
        "class_names": [f"c{i}" for i in range(CLASSES)],
        "provenance": provenance,
        "made_with": {},
    }
    create_module.create(path, images=images, views=views, attributes=attributes)
    return policy


def build(path: Path, n: int, views: int, varied: bool = False) -> list[float]:
    """Make a finished store. varied: no two labels of a view are the same. Returns, for
    each shard, the CPU seconds a row of StoreWriter.write."""
    images = manifest(n)
    policy = create(path, images, views)
    writer = StoreWriter(path)
    plan = CropSampler(policy, images, writer.store.shard_rows)
    seconds = []
    for shard in range(writer.store.shards):
        span = writer.store.shard_slice(shard)
        rows = np.arange(span.start, span.stop)
        codes = (
            some_codes(len(rows), shard)
            if varied
            else some_codes(PROTOTYPES, 0)[np.arange(len(rows)) % PROTOTYPES]
        )
        codes[images.status[rows] != USABLE] = 0
        crops = plan.crops(0, rows)
        began = time.process_time()
        write(writer, 0, shard, codes, *crops)
        seconds.append((time.process_time() - began) / len(rows))
    copy_views(path, 1)
    return seconds


def copy_views(path: Path, first: int) -> None:
    """Fill the views from ``first`` on with copies of view 0's files, and with records
    of their own."""
    writer = StoreWriter(path)
    store, records = writer.store, schema.array(writer.group, "records")
    for shard in range(store.shards):
        content = [store.array(name)[0, store.shard_slice(shard)] for name in store.shard_arrays]
        record = np.array([store.record(0, shard)])
        for view in range(first, store.views):
            for name in store.shard_arrays:
                file = store.file(name, view, shard)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(store.file(name, 0, shard), file)
            record["view"], record["digest"] = (
                view,
                np.frombuffer(schema.shard_digest(store.identity, view, shard, *content), "u1"),
            )
            records[view, shard] = record.view("u1")


def extend(path: Path, first: int, views: int) -> None:
    StoreWriter(path).grow(views)
    copy_views(path, first)


@contextmanager
def opening(path: Path) -> Iterator[Callable]:
    yield lambda: LabelStore.open(path)


@contextmanager
def reading_manifest(path: Path) -> Iterator[Callable]:
    store = LabelStore.open(path)
    yield lambda: store.images


@contextmanager
def looking_what_is_finished(path: Path) -> Iterator[Callable]:
    store = LabelStore.open(path)
    yield store.progress


@contextmanager
def resuming(path: Path) -> Iterator[Callable]:
    """Resume a store with one missing shard, as generate-labels does before its first
    unit, but without teachers, images and the check of shards."""
    store = LabelStore.open(path)
    record, aside = (
        store.file("records", store.views - 1, store.shards - 1),
        path.with_name("aside"),
    )

    def resume() -> None:
        writer = StoreWriter(path)
        now = writer.store
        assert not writer.uneven
        own = Share(views_per_decode=DECODES)
        share = own.places(now.finished())
        (unit,) = own.units(now.finished())
        usable = [
            int((now.images.status[now.shard_slice(shard)] == USABLE).sum())
            for shard in range(now.shards)
        ]
        CropSampler(policy_of(now), now.images, now.shard_rows)
        with writer.claimed(unit.views, unit.shard) as views:
            assert (
                views == [now.views - 1]
                and len(share) == now.views * now.shards - 1
                and len(usable) == now.shards
            )

    record.rename(aside)
    try:
        yield resume
    finally:
        aside.rename(record)


def sample(store: LabelStore) -> list[tuple[int, int]]:
    """Choose some shards, each of other views and rows. The last shard of a view is
    shorter, and is left out."""
    places = [
        (view, shard) for view in range(store.views) for shard in range(max(1, store.shards - 1))
    ]
    return [
        places[i] for i in np.linspace(0, len(places) - 1, min(SAMPLE, len(places))).astype(int)
    ]


def sampled(store: LabelStore) -> int:
    return sum(
        store.shard_slice(shard).stop - store.shard_slice(shard).start for _, shard in sample(store)
    )


@contextmanager
def checking(path: Path) -> Iterator[Callable]:
    """Compare the digests of some shards, as generate-labels does for its share and
    training does for each shard before its first use."""
    store = LabelStore.open(path)
    _ = store.images  # both commands have read the manifest by then

    def check() -> None:
        assert not any(store.fault(*place) for place in sample(store))

    yield check


@contextmanager
def verifying(path: Path) -> Iterator[Callable]:
    store = LabelStore.open(path)
    images = store.images

    def check() -> None:
        assert not any(verify._shard(store, images, *place)[0] for place in sample(store))

    yield check


@contextmanager
def planning_epoch(path: Path) -> Iterator[Callable]:
    source = stored_labels(LabelStore.open(path), 1)
    usable = source.images.usable
    yield lambda: sum(
        len(rows) for rows in epoch_windows(usable, source.block_rows, 0, 1, source.window_blocks)
    )


@contextmanager
def drawing_crops(path: Path) -> Iterator[Callable]:
    store = LabelStore.open(path)
    images, policy = store.images, policy_of(store)
    yield lambda: CropSampler(policy, images, store.shard_rows).crops(
        store.views - 1, np.arange(len(images))
    )


class Unrendered(Replay):
    """A replay whose batches are counted, not rendered."""

    def _batch(self, epoch: int, whole: Window) -> int:
        return len(whole.rows)


@contextmanager
def reading_epoch(path: Path) -> Iterator[Callable]:
    """Read labels and crops of a view in training order, digests compared, cut into
    batches: an epoch of every rank, but for its pictures."""
    store = LabelStore.open(path)
    replay = Unrendered(stored_labels(store, store.views), [224], Batching(512, 0))
    for view in range(store.views):
        store.require_finished(view)

    def epoch() -> None:
        with replay.epoch(store.views - 1) as batches:
            assert sum(batches) == len(store.usable)

    yield epoch


@contextmanager
def inspecting(path: Path) -> Iterator[Callable]:
    yield lambda: store_facts(path)


@contextmanager
def growing(path: Path) -> Iterator[Callable]:
    writer = StoreWriter(path)
    yield lambda: writer.grow(writer.store.views + 1)


CROPS, IMAGES, SAMPLED = (
    lambda store: store.views * len(store.images),
    lambda store: len(store.images),
    sampled,
)
# step → how it is run, the count that its cost is divided by, the name of a unit
STEPS: dict[str, tuple[Step, Callable[[LabelStore], int], str]] = {
    "open": (opening, CROPS, "crop"),
    "manifest": (reading_manifest, IMAGES, "image"),
    "finished": (looking_what_is_finished, CROPS, "crop"),
    "resume": (resuming, CROPS, "crop"),
    "check": (checking, SAMPLED, "crop"),
    "plan": (planning_epoch, IMAGES, "image"),
    "draw": (drawing_crops, IMAGES, "crop"),
    "epoch": (reading_epoch, IMAGES, "crop"),
    "inspect": (inspecting, CROPS, "crop"),
    "verify": (verifying, SAMPLED, "crop"),
    "grow": (growing, CROPS, "crop"),  # last: it leaves views without labels
}


def memory(name: str) -> int:
    """Return this process's memory in MiB: VmRSS, resident now, or VmHWM, at most.
    (ru_maxrss would include the parent's memory.)"""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) // 1024 for line in f if line.startswith(name))


def in_child(work: Callable, *args: object) -> object:
    """Run ``work`` in a forked process, which has the imports and nothing else."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(work(*args)))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__}{args} failed") from None
    finally:
        child.join()


def timed(path: Path, name: str) -> dict:
    """Measure the medians of one step, on a store opened anew each time."""
    step, shared, per = STEPS[name]
    count = shared(LabelStore.open(path))
    Path("/proc/self/clear_refs").write_text("5")  # reset the highest memory
    before = memory("VmRSS")
    wall, cpu = [], []
    while len(wall) < REPEATS and (len(wall) < 3 or sum(wall) < PATIENCE):
        with step(path) as run:
            began = time.perf_counter(), time.process_time()
            run()
            wall.append(time.perf_counter() - began[0])
            cpu.append(time.process_time() - began[1])
        del run  # and the store that it holds
        if len(wall) == 1:
            highest = memory("VmHWM")
    return {
        "wall_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "runs": len(wall),
        "per": per,
        "count": count,
        "cpu_ns": 1e9 * statistics.median(cpu) / count,
        "wall_ns": 1e9 * statistics.median(wall) / count,
        "memory_mib": highest - before,
    }


def command(path: Path) -> float:
    """Return the seconds that a user waits for ``inspect``, imports and all."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "inspect", str(path), "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def shape(path: Path) -> dict:
    store = LabelStore.open(path)
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    return {
        "images": len(store.images),
        "views": store.views,
        "crops": CROPS(store),
        "shards": store.views * store.shards,
        "files": len(files),
        "bytes": sum(map(os.path.getsize, files)),
        "label_bytes_per_crop": float(store.records()["stored_bytes"][0].sum() / len(store.images)),
    }


def measure(path: Path, steps: list[str]) -> dict:
    return {
        **in_child(shape, path),
        "inspect_command_s": command(path),
        "steps": {name: in_child(timed, path, name) for name in steps},
    }


def machine() -> dict:
    with open("/proc/cpuinfo") as f:
        model = next(
            (line.split(":")[1].strip() for line in f if line.startswith("model name")),
            platform.machine(),
        )
    with open("/proc/meminfo") as f:
        memory_gib = int(f.readline().split()[1]) / 2**20
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zarr": __import__("zarr").__version__,
    }


def computed(varied: dict) -> dict:
    """Compute the files of ImageNet × 180 views, and their bytes if a crop takes as
    many as in ``varied``, whose labels differ."""
    n, views = IMAGENET
    _, shard_rows = schema.shard_rows_for(n, CLASSES, 1)
    arrays = len(schema.shard_arrays({"provenance": {}, "codec": CODECS[DEFAULT].describe()}))
    shards, columns = views * -(-n // shard_rows), len(Images.__dataclass_fields__)
    # a zarr.json for the store, each array, records, images, and each column of images
    descriptions = 1 + arrays + 1 + 1 + columns
    files = shards * (arrays + 1) + columns * -(-n // (1 << 16)) + descriptions
    return {
        "shards": shards,
        "files": files,
        "bytes": int(n * views * varied["bytes"] / varied["crops"]),
    }


def table(sizes: dict[str, dict], varied: dict, whole: dict) -> None:
    base = sizes.get(BASE) or next(iter(sizes.values()))
    print(
        f"CPU time in ns per crop (manifest, plan: per image), and its ratio to that at "
        f"{base['crops']:,} crops"
    )
    print(f"{'crops':15}" + "".join(f"{name:>16}" for name in STEPS))
    for size, row in sizes.items():
        cost = {
            name: (step["cpu_ns"], step["cpu_ns"] / base["steps"][name]["cpu_ns"])
            for name, step in row["steps"].items()
        }
        print(
            f"{size:15}"
            + "".join(
                f"{f'{_figure(cost[name][0])} ×{_figure(cost[name][1])}' if name in cost else '':>16}"  # noqa: E501
                for name in STEPS
            )
        )
    print(
        "\nSeconds for the whole step (check, verify: of some shards), and MiB of memory beyond "
        "the imports; files and MiB on the disk; inspect as a command"
    )
    print(
        f"{'crops':15}"
        + "".join(f"{name:>16}" for name in STEPS)
        + f"{'files':>9}{'MiB':>8}{'command':>9}"
    )
    for size, row in sizes.items():
        cells = [
            f"{step['wall_s']:.3f} s {step['memory_mib']:3} M"
            if (step := row["steps"].get(name))
            else ""
            for name in STEPS
        ]
        cells = "".join(f"{cell:>16}" for cell in cells)
        print(
            f"{size:15}{cells}{row['files']:9,}{row['bytes'] / 2**20:8,.0f}"
            f"{row['inspect_command_s']:7.1f} s"
        )
    ratios = {
        f"{name} at {size}": step["cpu_ns"] / base["steps"][name]["cpu_ns"]
        for size, row in sizes.items()
        if row["crops"] > base["crops"]
        for name, step in row["steps"].items()
    }
    if ratios:
        worst = max(ratios, key=ratios.get)
        print(
            f"\nNo step costs more than ×{ratios[worst]:.2f} "
            f"beyond {base['crops']:,} crops ({worst})"
        )
    if BASE in sizes:
        more = ", ".join(
            f"{name} ×{step['cpu_ns'] / base['steps'][name]['cpu_ns']:.2f}"
            for name, step in varied["steps"].items()
        )
        print(
            f"Labels that differ ({varied['label_bytes_per_crop']:.0f} bytes each) against "
            f"repeated ones, at 10^5 crops: {more}"
        )
    print(
        f"ImageNet × 180 views: {whole['shards']:,} shards, {whole['files']:,} files, "
        f"{whole['bytes'] / 2**30:.0f} GiB with labels that differ"
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--largest",
        type=int,
        default=8,
        choices=list(SIZES),
        help="log10 of the largest number of crops [8; 8 adds ImageNet × 180]",
    )
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where stores are made, and removed [the system's folder for temporary files]",
    )
    options = parser.parse_args()
    sizes: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale.") as folder:
        path = Path(folder, "varied.zarr")
        in_child(build, path, *SIZES[5], True)
        varied = measure(path, ["check", "epoch", "verify"])
        shutil.rmtree(path)
        for exponent in range(3, options.largest + 1):
            size, path = f"10^{exponent}", Path(folder, f"{exponent}.zarr")
            began = time.perf_counter()
            written = in_child(build, path, *SIZES[exponent])
            sizes[size] = measure(path, list(STEPS)) | {
                "write_ns": 1e9 * statistics.median(written)
            }
            print(
                f"{size}: made and measured in {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            if exponent == 8:
                in_child(extend, path, SIZES[8][1], IMAGENET[1])
                sizes["ImageNet × 180"] = measure(path, [name for name in STEPS if name != "grow"])
            shutil.rmtree(path)
    whole = computed(varied)
    table(sizes, varied, whole)
    if options.out:
        result = {
            "machine": machine(),
            "sizes": sizes,
            "varied": varied,
            "imagenet_180_computed": whole,
        }
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
