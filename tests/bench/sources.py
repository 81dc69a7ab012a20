"""Measure where images lie: what reading one takes from files, tar files and parquet
files, and what a start with ImageNet's number of images in tar files takes.

    python tests/bench/sources.py                        # some minutes, 3 GB of disk
    python tests/bench/sources.py --small                # seconds
    python tests/bench/sources.py --photographs FOLDER   # class folders of real images

Reading: microseconds an image in random order on one thread, as the loader reads, with
the sha256 of the manifest; warm (the page cache has the files) and cold (the kernel was
told to forget them; that is advice, so a figure near warm says that it didn't). The
ratio is to class folders, in the same run.

Remote: a bucket of a server on this machine (SeaweedFS), so that no network is
measured, only what reading over one costs besides. Microseconds an image from a tar
file in the cache, and by parts from the bucket with several threads; MB/s of fetching
tar files into the cache, beside one plain stream of urllib's from the same server.
Left out where SeaweedFS isn't installed.

Starting: seconds, and the peak of a process's memory. The tar files hold headers and
tiny contents in place of photographs, since a start reads headers alone. Every step
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import obstore

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.bucket_server import serving, weed
from support.containers import as_shards, parquet
from support.small import write_photos

from cache.format.manifest import Images
from pipeline.images.data_set import DataSet
from pipeline.images.matching import require_same_files
from pipeline.images.reader import Reader
from pipeline.images.scan import scan
from pipeline.images.sources.remote import store
from pipeline.images.sources.remote.files import RemoteFiles
from pipeline.images.sources.remote.url import Url
from pipeline.render.settings import RenderSettings
from pipeline.runtime.wording import counted

REPEATS = 5
FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "tar files": as_shards,
    "parquet, as it is": parquet(compression="none", use_dictionary=False),
    "parquet, snappy, unpacked": parquet(compression="snappy", use_dictionary=False),
}


def forget(folder: Path) -> None:
    """Tell the kernel to forget the pages of all files below a folder."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def microseconds(data: DataSet, places: list[Path], *, cold: bool) -> float:
    """Return the median time of reading an image of a data set, in random order."""
    found = scan(data, RenderSettings(threads=2))
    rows = np.random.default_rng(0).permutation(found.usable)
    took = []
    with Reader(data, found, 1) as read:
        read(rows)
        for _ in range(REPEATS):
            for place in places if cold else ():
                forget(place)
            begun = time.perf_counter()
            read(rows)
            took.append(1e6 * (time.perf_counter() - begun) / len(rows))
    return statistics.median(took)


def reading(work: Path, photographs: Path | None, small: bool) -> dict[str, dict[str, float]]:
    """Measure reading, by form and temperature."""
    folder = photographs
    if folder is None:
        folder = work / "folder" / "train"
        write_photos(folder, 4 if small else 100)
    cache = Path(os.environ["OFFLINE_MEAL_CACHE"])
    forms = {"class folders": folder}
    for name, write in FORMS.items():
        forms[name] = write(folder, work / name.replace(" ", "-").replace(",", ""))
    found = {}
    for name, place in forms.items():
        data, places = DataSet.find(place, "train"), [place, cache]
        found[name] = {
            "warm": microseconds(data, places, cold=False),
            "cold": microseconds(data, places, cold=True),
        }
    return found


def remote(work: Path, photographs: Path | None, small: bool) -> dict[str, float]:
    """Measure a bucket: µs an image by kind of reading, MB/s by kind of fetching."""
    if weed() is None:
        return {}
    folder = photographs
    if folder is None:
        folder = write_photos(work / "remote" / "train", 4 if small else 100)
    shards, cache = as_shards(folder, work / "remote-shards"), work / "remote-cache"
    large = work / "large"
    large.mkdir()
    for i in range(2 if small else 8):
        (large / f"x-{i}.tar").write_bytes(os.urandom((1 if small else 128) << 20))
    size = sum(file.stat().st_size for file in large.iterdir())
    found = {}
    with serving(work / "seaweed") as bucket:
        os.environ |= bucket.variables | {"OFFLINE_MEAL_CACHE": str(cache)}
        url, far = bucket.put(shards, "shards"), bucket.put(large, "large")
        local = DataSet.find(url, "train")
        images = scan(local, RenderSettings(threads=2))
        found["tar files in the cache, 1 thread"] = pace(local, images, 1)
        shutil.rmtree(cache / "remote")
        parts = DataSet.find(url, "train")
        parts.source.files.whole_ones.clear()
        for threads in (1, 8, 64):
            found[f"by parts, {counted(threads, 'thread')}"] = pace(parts, images, threads)
        objects, _ = store.listed(Url.parse(far))
        begun = time.perf_counter()
        RemoteFiles(objects, Url.parse(far)).ready()
        found["fetched into the cache, MB/s"] = size / 1e6 / (time.perf_counter() - begun)
        begun = time.perf_counter()
        for one in objects:
            signed = obstore.sign(bucket.store, "GET", one.url.path, timedelta(hours=1))
            with urllib.request.urlopen(signed) as answer, open(work / "plain", "wb") as out:
                shutil.copyfileobj(answer, out, 1 << 18)
        found["urllib, one stream to a file, MB/s"] = size / 1e6 / (time.perf_counter() - begun)
    return found


def pace(data: DataSet, images: Images, threads: int) -> float:
    """Return the median µs an image of reading all images, in random order."""
    rows = np.random.default_rng(0).permutation(images.usable)
    took = []
    with Reader(data, images, threads) as read:
        read(rows)
        for _ in range(REPEATS):
            begun = time.perf_counter()
            read(rows)
            took.append(1e6 * (time.perf_counter() - begun) / len(rows))
    return statistics.median(took)


def write_shards(out: Path, images: int, shards: int) -> None:
    """Write tar files of tiny members, named as ImageNet's shards."""
    out.mkdir()
    for shard in range(shards):
        with open(out / f"imagenet-train-{shard:06d}.tar", "wb") as file:
            for i in range(shard, images, shards):
                c = i * 7919 % 1000
                for suffix, content in (("cls", str(c).encode()), ("jpg", b"%8d" % i)):
                    info = tarfile.TarInfo(f"n{1_440_764 + 13_517 * c:08d}_{i}.{suffix}")
                    info.size = len(content)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
            file.write(bytes(1024))


def step(name: str, shards: Path) -> None:
    """Run one step of a start, and print its seconds and its peak memory in bytes."""
    begun = time.perf_counter()
    if name == "first":
        DataSet.find(shards, "train")
    if name == "compare":
        listing = DataSet.find(shards, "train").list()
        n = len(listing)
        images = Images(
            listing.name,
            listing.size,
            np.zeros((n, 32), np.uint8),
            np.ones(n, np.int32),
            np.ones(n, np.int32),
            listing.class_index,
            np.zeros(n, np.uint8),
            np.full(n, "", object),
        )
        begun = time.perf_counter()
        data = require_same_files(DataSet.find(shards, "train"), images, "labels.zarr")
        data.addresses(images)
    if name == "list":
        DataSet.find(shards, "train").list()
    seconds = time.perf_counter() - begun
    # Not getrusage, which begins with the peak of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(seconds, int(peak[1]) * 1024)


def starting(work: Path, images: int, shards: int) -> dict[str, dict[str, float]]:
    """Measure a start: the first, which reads headers, and those that follow."""
    place = work / "shards"
    write_shards(place, images, shards)
    found = {}

    def measured(name: str, what: str) -> None:
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--step", what, "--shards-in", place],
            check=True,
            capture_output=True,
            text=True,
        )
        seconds, memory = map(float, done.stdout.split())
        found[name] = {
            "seconds": seconds,
            "whole": time.perf_counter() - begun,
            "bytes": memory,
        }

    measured("imports alone", "base")
    measured("first start: read all headers, keep the index", "first")
    measured("later start: list from the kept index", "list")
    measured("later start: compare with a manifest", "compare")
    return found


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--photographs", type=Path, help="class folders of real images")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--small", action="store_true", help="few images, for a test")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--shards-in", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        return step(given.step, given.shards_in)
    images, shards = (2000, 8) if given.small else (given.images, given.shards)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        work = Path(folder)
        os.environ["OFFLINE_MEAL_CACHE"] = str(work / "cache")
        read = reading(work, given.photographs, given.small)
        far = remote(work, given.photographs, given.small)
        begin = starting(work, images, shards)
    print(f"{'microseconds an image':28}{'warm':>8}{'ratio':>8}{'cold':>8}{'ratio':>8}")
    base = read["class folders"]
    for name, took in read.items():
        cells = "".join(f"{took[t]:8.0f}{took[t] / base[t]:8.2f}" for t in ("warm", "cold"))
        print(f"{name:28}{cells}")
    print("\na bucket on this machine (µs an image)")
    for name, figure in far.items():
        print(f"{name:36}{figure:8.0f}")
    print(f"\n{images:,} images in {shards:,} tar files")
    for name, took in begin.items():
        print(f"{name:48}{took['seconds']:8.1f} s{took['bytes'] / 2**20:8.0f} MiB")
    if given.out:
        result = {
            "reading": read,
            "remote": far,
            "starting": begin,
            "images": images,
            "shards": shards,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
