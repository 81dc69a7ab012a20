"""Predict the cost of filling a store from a short timing on this machine
(``generate-labels --plan``). Nothing is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numcodecs import Zstd

from cache import LabelStore
from cache.errors import MealError, StoreError
from cache.format.codec import CODECS
from pipeline.config import Config, ConfigError
from pipeline.images.class_names import map_classes
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.images.result_places import require_outside
from pipeline.images.scan import Look
from pipeline.images.sources.source import Listing
from pipeline.labelling import cost
from pipeline.labelling.cost import BYTES_PER_CROP, BYTES_PER_MIXED_CROP, GPU_FLOPS, IMAGENET_IMAGES
from pipeline.labelling.shares import Share
from pipeline.models.classes import known_classes
from pipeline.models.model import Model, ModelError, ensemble
from pipeline.models.weights import load, load_teachers
from pipeline.provenance.description import as_begun, layout_of
from pipeline.provenance.refusals import require_class_count, require_same_recipe
from pipeline.render import dali
from pipeline.render.renderer import CropRenderer, Rendered
from pipeline.render.settings import RenderSettings
from pipeline.runtime.precision import fixed_shapes, require_precision
from pipeline.runtime.profiling import Clock
from pipeline.runtime.progress import say
from pipeline.sampling import philox, random_crop

IMAGES = 64  # images that are read, rendered and labelled for the timing
SECONDS = 2.0  # least duration of a timing
# Crops of the forward pass that is timed on a CPU. A whole batch is timed instead if it
# takes at most LONG seconds.
SLOW = 8
LONG = 2.0
CLASSES = 1000  # classes of the labels in KNOWN
BOX = 12  # measured bytes of a crop's box and flip, compressed
# Bytes per label by codec, measured with two real teachers (cache/README.md). The
# default codec's figure follows from cost.py.
KNOWN = {
    "float32": 3590,
    "float16": 1738,
    "cbrt8": 584,
    "pow8": BYTES_PER_CROP - BOX,
    "sqrt8": 413,
    "tail255": 214,
    "tail80": 55,
    "tail40": 26,
}


@dataclass(frozen=True)
class Plan:
    """The predicted cost of filling a store.

    Rates are in crops per second. ``hours`` are hours of this machine, ``gpu_hours``
    hours of a GPU of ``GPU_FLOPS``. Bytes are bytes on disk.
    """

    images: int
    counted: bool  # whether the images of --data were counted; otherwise ImageNet's number
    views: int
    crops: int
    finished: float  # share of the crops that the store holds already, 0 … 1
    classes: int
    teachers: list[str]
    real_weights: bool
    device: str
    precision: str
    teachers_per_second: float
    loader_per_second: float | None
    # Milliseconds a crop of reading, decoding and resizing. Decoding goes on beside
    # resizing, so the sum is more than the loader takes.
    loader_milliseconds: dict[str, float] | None
    crops_per_second: float
    hours: float
    workers: int
    gflop_per_crop: float
    gpu_hours: float
    codec: str
    bytes_per_crop: float
    bytes_measured: bool
    store_bytes: float
    bytes_left: float
    shards: int
    files: int
    free_bytes: int | None


def make_plan(
    config: Config,
    data: DataSet | None,
    path: Path | None,
    *,
    device: torch.device,
    share: Share | None = None,
) -> Plan:
    """Time teachers and loader briefly, and predict crops, hours and bytes of the store
    that ``config`` asks for.

    data: its images are counted, and some of them are read, rendered and labelled.
    None: ImageNet's number of images is assumed, and the teachers alone are timed, on
    noise. path: the store. Its finished shards are not counted again, and the free
    space on its disk is reported. share: its number of workers divides the hours, and
    views before its first view don't count. Teachers whose weights can't be fetched are
    timed with random weights. Raises MealError for whatever ``generate-labels`` would
    refuse.
    """
    share, config = share or Share(), _as_begun(config, path)
    if data is not None:
        require_outside("--store", path, data)
    require_precision(config.store.precision, device, "store.precision")
    teachers, real = _teachers(config, device)
    classes = teachers[0].classes
    count, pixels, rendering, boxes = IMAGENET_IMAGES, None, None, None
    loader: dict[str, float] | None = None
    if data is not None:
        data = map_classes(data, known_classes(teachers), "the teachers", classes)
        data.require_sound()
        require_class_count(data, teachers)
        files = data.list()
        count = len(files)
        some = np.unique(np.linspace(0, count - 1, min(count, IMAGES)).astype(int))
        pixels, boxes, rendering, loader = _rendered(
            config, data, files.take(some), {t.image_size for t in teachers}
        )
    if pixels is None:
        n = config.store.batch_size
        pixels = {
            t.image_size: torch.randint(256, (n, t.image_size, t.image_size, 3), dtype=torch.uint8)
            for t in teachers
        }
    p, forward = _labelled(config, teachers, pixels, device)
    # On a GPU teachers and loader work at the same time, so the slower one sets the
    # pace. On a CPU they share the cores, so their times add up.
    per_crop = max(forward, rendering or 0) if device.type == "cuda" else forward + (rendering or 0)
    measured = _bytes_per_crop(config, p, boxes) if real and boxes is not None else None
    size = measured or _bytes_known(config, classes)
    views = config.crops.views - share.first_view
    if views < 1:
        raise ConfigError(
            f"--first-view {share.first_view} leaves nothing of {config.crops.views} views (the "
            f"first is 0); raise --views"
        )
    total = count * views
    here = path is not None and path.exists()
    finished = (
        _finished(path, config, teachers if real else [], device, share.first_view) if here else 0.0
    )
    left = total * (1 - finished)
    shards = -(-count // layout_of(config, count, classes)[1]) * views
    gflop = sum(cost.flops(t.name, t.image_size)[0] for t in teachers) / 1e9
    return Plan(
        images=count,
        counted=data is not None,
        views=views,
        crops=total,
        finished=finished,
        classes=classes,
        teachers=[t.name for t in teachers],
        real_weights=real,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        precision=config.store.precision,
        teachers_per_second=1 / forward,
        loader_per_second=1 / rendering if rendering else None,
        loader_milliseconds=loader,
        crops_per_second=1 / per_crop,
        hours=left * per_crop / 3600,
        workers=share.workers,
        gflop_per_crop=gflop,
        gpu_hours=left * gflop * 1e9 / (3600 * GPU_FLOPS),
        codec=config.store.codec,
        bytes_per_crop=size,
        bytes_measured=measured is not None,
        store_bytes=total * size,
        bytes_left=left * size,
        shards=shards,
        files=shards * (4 + 2 * bool(config.crops.cutmix) + bool(CODECS[config.store.codec].tail)),
        free_bytes=_free(path),
    )


def _as_begun(config: Config, path: Path | None) -> Config:
    """Complete a config with the resize of the store that is there, if it can be
    read."""
    try:
        return as_begun(config, LabelStore.open(path).provenance) if path else config
    except MealError:  # told when its finished shards are counted
        return config


def _teachers(config: Config, device: torch.device) -> tuple[list[Model], bool]:
    """Load the teachers. Returns the teachers, and whether they have their real weights
    (otherwise random ones)."""
    try:
        teachers = load_teachers(config.teachers, device)
        for line in (line for teacher in teachers for line in teacher.notes):
            say(line)
        return teachers, True
    except ModelError as error:
        if "can't be fetched" not in str(error):
            raise
        say(f"timed with random weights instead: {error}")
    specs = [
        spec if spec.checkpoint else spec.model_copy(update={"pretrained": False})
        for spec in config.teachers
    ]
    return [load(spec, seed=i).to(device) for i, spec in enumerate(specs)], False


def _rendered(
    config: Config, data: DataSet, files: Listing, sizes: set[int]
) -> tuple[dict[int, torch.Tensor], np.ndarray, float, dict[str, float]]:
    """Render crops of some images.

    files: the images of ``data`` to look at. Returns the crops by output size, their
    boxes [n, 4], the seconds that reading and rendering took per crop, and the
    milliseconds of each part of it.
    """
    look = Look(data.source, RenderSettings.of_config(config))
    with dali.quiet_decoders():
        shapes = {row: shape for row in range(len(files)) if (shape := look(files, row)[1])}
    good = list(shapes)
    if not good:
        raise DataError(
            f"none of {len(files)} images of {data.path} that were looked at can be decoded; look "
            f"at them, or pass another --data"
        )
    views = min(config.crops.views, config.store.views_per_decode)
    identity = philox.identities(files.name[good])
    height, width = np.array([shapes[row] for row in good]).T
    drawn = [random_crop.draw(config.crops, identity, height, width, view) for view in range(views)]
    boxes, flips = (np.stack(column) for column in zip(*drawn, strict=True))
    settings, clock = RenderSettings.of_config(config), Clock()
    renderer = CropRenderer(sorted(sizes), views, len(good), settings, clock=clock)

    def work() -> Rendered:
        with clock.part("read"):
            blobs = [data.source.read(files.address[row]) for row in good]
        made = renderer(blobs, boxes, flips)
        if renderer.gpu:
            torch.cuda.synchronize()
        return made

    with renderer:
        made = work()
        clock.begin()
        seconds, calls = _timed(work)
    return (
        {size: torch.cat([view[size] for view in made]) for size in sizes},
        boxes.reshape(-1, 4),
        seconds / (views * len(good)),
        {part: 1000 * took / (calls * views * len(good)) for part, took in clock.seconds.items()},
    )


def _labelled(
    config: Config, teachers: Sequence[Model], pixels: dict[int, torch.Tensor], device: torch.device
) -> tuple[np.ndarray, float]:
    """Label crops, and time the teachers.

    Returns the labels of at most ``IMAGES`` crops, from which the bytes per crop are
    measured, and the teachers' seconds per crop.
    """
    pixels = {size: p.to(device) for size, p in pixels.items()}
    batch, most = config.store.batch_size, len(next(iter(pixels.values())))
    if config.store.compile:
        teachers = [teacher.compiled_teacher(config.store.precision) for teacher in teachers]
    # A GPU or a compiled model runs other kernels for other batch sizes, so only the
    # real batch size is timed.
    only_batches = device.type == "cuda" or config.store.compile

    def forward(crops: dict[int, torch.Tensor], batch_size: int) -> torch.Tensor:
        p = ensemble(teachers, crops, config.store.precision, batch_size=batch_size)[0]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return p

    def timed(n: int) -> float:
        crops = {size: p[torch.arange(n, device=device) % most] for size, p in pixels.items()}
        forward(crops, n)
        return _timed(lambda: forward(crops, n))[0] / n

    with fixed_shapes():
        per_crop = timed(batch if only_batches else min(batch, most, SLOW))
        # Small models are slower in small batches.
        if not only_batches and per_crop * batch <= LONG:
            per_crop = timed(min(batch, most))
        few = {size: p[:IMAGES] for size, p in pixels.items()}
        return forward(
            few, batch if only_batches else min(batch, most, IMAGES)
        ).cpu().numpy(), per_crop


def _timed(work: Callable[[], object]) -> tuple[float, int]:
    """Call as often as takes ``SECONDS``. Returns the mean seconds per call, and the
    number of calls."""
    begun, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - begun < SECONDS:
        work()
        calls += 1
    return (time.perf_counter() - begun) / calls, calls


def _bytes_per_crop(config: Config, p: np.ndarray, boxes: np.ndarray) -> float:
    """Measure the compressed bytes per crop of label, box and flip. CutMix adds partner
    and rectangle, which hardly compress."""
    codec = CODECS[config.store.codec]
    boxes = np.ascontiguousarray(boxes[: len(p)], np.int32)
    label = len(Zstd(level=codec.compression).encode(np.ascontiguousarray(codec.encode(p))))
    return (
        (label + len(Zstd(level=3).encode(boxes))) / len(p)
        + 1 / 8
        + (20 if config.crops.cutmix else 0)
    )


def _bytes_known(config: Config, classes: int) -> float:
    """Estimate the bytes per crop from labels that real teachers gave for 1,000
    classes."""
    label = (
        KNOWN[config.store.codec]
        * classes
        / CLASSES
        * (BYTES_PER_MIXED_CROP / BYTES_PER_CROP if config.crops.cutmix else 1)
    )
    return label + BOX + (20 if config.crops.cutmix else 0)


def _finished(
    path: Path, config: Config, teachers: list[Model], device: torch.device, first_view: int
) -> float:
    """Return the share of the wanted shards that a store has finished, 0 … 1.

    A store that this command would refuse counts as 0. Without ``teachers`` the recipe
    can't be compared, and is taken to be the same.
    """
    try:
        store = LabelStore.open(path)
        if store.made_by != "generate-labels":
            raise StoreError(f"it was made by {store.made_by}; choose another --store")
        if teachers:
            require_same_recipe(store, config, teachers, device)
    except MealError as error:
        say(f"{path} is not counted: {error}")
        return 0.0
    views = config.crops.views
    return float(store.finished()[first_view:views].sum() / ((views - first_view) * store.shards))


def _free(path: Path | None) -> int | None:
    """Return the free bytes on the disk of the store; None without ``path``."""
    place = (
        next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None)
        if path is not None
        else None
    )
    return shutil.disk_usage(place).free if place else None
