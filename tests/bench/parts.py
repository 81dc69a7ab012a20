"""Provide the benchmarks' common parts: photographs, models and stores in a temporary
folder, both stages on them, and pairs of timings."""

from __future__ import annotations

import io
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from pipeline.images.data_set import DataSet
from pipeline.images.sources.class_folders import ClassFolders

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.stages import scan, stored_labels

from cache import LabelStore
from cache.format.manifest import Images
from cache.writer import StoreWriter
from pipeline.config import Config
from pipeline.config_file import validate
from pipeline.images.reader import Reader
from pipeline.labelling import create_store, stream
from pipeline.labelling.inputs import Labelling
from pipeline.labelling.shares import Share, Unit
from pipeline.labelling.stream import Labeller
from pipeline.models.model import Model
from pipeline.runtime.execution import Execution
from pipeline.runtime.profiling import Clock
from pipeline.runtime.progress import Progress
from pipeline.training import batches, losses
from pipeline.training.loop import Run
from pipeline.training.source import DrawnCrops, StoredLabels

CPU = torch.device("cpu")
CLASSES = [f"c{i:03d}" for i in range(1000)]
FOLDERS = 16


@dataclass(frozen=True)
class Extent:
    """The amount of data and the models that are measured with."""

    photographs: int = 256  # different photographs
    copies: int = 16
    teachers: tuple[str, str] = ("tf_efficientnet_lite1", "tf_efficientnet_lite2")
    student: str = "tf_efficientnet_lite0"
    rows: int = 100_000  # rows of labels that are read alone
    files: int = 1_000  # label files, one per image
    image_size: int | None = None  # pixels, of the teachers; None: their own sizes


SMALL = Extent(32, 2, ("test_resnet", "test_efficientnet"), "test_efficientnet", 2_000, 20)


@dataclass
class Figure:
    name: str
    ratios: list[float]
    least: float | None  # the aim
    detail: str

    def row(self) -> str:
        median = statistics.median(self.ratios)
        spread = (
            f" ({min(self.ratios):.3g} to {max(self.ratios):.3g})" if len(self.ratios) > 1 else ""
        )
        aim = (
            ""
            if self.least is None
            else f"≥ {self.least:.3g}: {'met' if median >= self.least else 'missed'}"
        )
        return f"| {self.name} | {median:.3g}{spread} | {aim} | {self.detail} |"


class StandIn(Model):
    """A model that sleeps for ``seconds``, without the interpreter's lock."""

    seconds = 0.0

    def __call__(self, pixels: torch.Tensor, precision: str = "float32") -> torch.Tensor:
        time.sleep(self.seconds)
        return self.module.bias.expand(len(pixels), -1)


class First(Clock):
    """A clock that also knows when the teachers began."""

    first = 0.0

    def part(self, name: str, *, of_model: bool = False, among: int = 1) -> AbstractContextManager:
        if name == "teachers":
            self.first = self.first or time.perf_counter()
        return super().part(name, of_model=of_model, among=among)


def stand_in(seconds: float, device: torch.device = CPU) -> StandIn:
    module = nn.Module()
    module.bias = nn.Parameter(
        torch.randn(len(CLASSES), generator=torch.Generator().manual_seed(0)) * 3
    )
    model = StandIn(module, "stand_in", len(CLASSES), 224, (0.5,) * 3, (0.5,) * 3, "bilinear")
    model.seconds = seconds
    return model.to(device)


@contextmanager
def serial() -> Iterator[None]:
    """Do nothing beside anything else: no thread ahead, none behind."""

    @contextmanager
    def ahead(items: Iterator, depth: int = 2) -> Iterator[Iterator]:
        yield iter(items)

    @contextmanager
    def behind(deal_with: Callable, depth: int = 2) -> Iterator[Callable]:
        yield deal_with

    with (
        mock.patch.multiple(stream, ahead=ahead, behind=behind),
        mock.patch.object(batches, "ahead", ahead),
    ):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread. The little arithmetic around a stand-in would be the
    accelerator's, and many threads would take the loader's cores for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settle() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(do: Callable[[], object]) -> float:
    settle()
    begun = time.perf_counter()
    do()
    settle()
    return time.perf_counter() - begun


def mean_seconds(do: Callable[[], object]) -> float:
    """Return the seconds of one call, as the mean of ten."""
    return seconds(lambda: [do() for _ in range(10)]) / 10


def pairs(a: Callable[[], float], b: Callable[[], float], n: int) -> list[tuple[float, float]]:
    """Take n pairs of timings, a and b in turn."""
    return [(a(), b()) for _ in range(n)]


class Place:
    """Photographs, models, and stores of them, in a temporary folder, on one device.

    files: photographs (JPEG files); None: pieces of scikit-learn's samples.
    """

    def __init__(
        self,
        folder: Path,
        repeats: int,
        extent: Extent,
        device: torch.device = CPU,
        files: list[Path] | None = None,
    ) -> None:
        self.folder, self.repeats, self.extent, self.number = folder, repeats, extent, 0
        self.device, self.files = device, files

    @cached_property
    def many(self) -> Path:
        """A folder that holds each photograph ``extent.copies`` times."""
        return self._photographs("many", self.extent.copies)

    @cached_property
    def few(self) -> Path:
        return self._photographs("few", 1)

    def _photographs(self, name: str, links: int) -> Path:
        folder = self.folder / name
        for i, blob in enumerate(self.encoded):
            file = folder / CLASSES[i % FOLDERS] / f"{i:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(blob)
            for k in range(1, links):
                os.link(file, file.with_name(f"{i:04d}_{k}.jpg"))
        return folder

    @cached_property
    def encoded(self) -> list[bytes]:
        """Encode as many photographs as the extent says, as JPEG."""
        if self.files:
            return [
                self.files[i % len(self.files)].read_bytes() for i in range(self.extent.photographs)
            ]
        from sklearn.datasets import load_sample_images

        rng, photos, found = np.random.default_rng(0), load_sample_images().images, []
        for i in range(self.extent.photographs):
            height, width = rng.integers(320, 427), rng.integers(400, 560)
            photo = photos[i % 2]
            top, left = (
                rng.integers(0, photo.shape[0] - height),
                rng.integers(0, photo.shape[1] - width),
            )
            out = io.BytesIO()
            Image.fromarray(photo[top : top + height, left : left + width]).save(
                out, "JPEG", quality=93
            )
            found.append(out.getvalue())
        return found

    @cached_property
    def teachers(self) -> list[dict]:
        found = []
        for seed, name in enumerate(self.extent.teachers):
            torch.manual_seed(seed)
            file = self.folder / f"{name}.safetensors"
            safetensors.torch.save_file(timm.create_model(name).state_dict(), file)
            found.append(
                {"model": name, "checkpoint": str(file), "image_size": self.extent.image_size}
            )
        return found

    def config(self, **sections: dict) -> Config:
        document = {
            "student": {"model": self.extent.student, "pretrained": False},
            "store": {"batch_size": 64},
            **sections,
        }
        document["train"] = {
            "image_size": 224,
            "batch_size": 32,
            "epochs": 1000,
            "milestones": [],
            **document.get("train", {}),
        }
        return validate(document, "bench")

    @cached_property
    def manifest(self) -> Images:
        return scan(self.many, CLASSES, exif="ignore", order_seed=0)

    def empty(self, config: Config, data: Path, teachers: list[Model]) -> Path:
        self.number += 1
        path = self.folder / f"{self.number}.zarr"
        create_store.create_store(self.labelling(config, data, teachers), path)
        return path

    def labelling(self, config: Config, data: Path, teachers: list[Model]) -> Labelling:
        return Labelling(
            config, DataSet(ClassFolders(data), CLASSES), teachers, Execution(self.device)
        )

    def labeller(
        self, config: Config, data: Path, path: Path, teachers: list[Model], stack: ExitStack
    ) -> tuple[Labeller, list[Unit]]:
        writer = StoreWriter(path)
        store = writer.store
        read = stack.enter_context(Reader(DataSet(ClassFolders(data), CLASSES), store.images))
        units = Share(views_per_decode=config.store.views_per_decode).units(store.finished())
        return Labeller(self.labelling(config, data, teachers), writer, read), units

    def rendered(self, run: Labeller, units: list[Unit]) -> Iterator[list[dict[int, torch.Tensor]]]:
        """Render these units as the loader does, batch by batch, per view, for no
        model."""
        run.room = threading.Semaphore(len(units) + 1)  # one to find out that there is no more
        for _, _, views in run._batches(units):
            yield views
        for job in run.open:
            job.claims.close()

    def labelled(
        self, config: Config, data: Path, empty: Path, teachers: list[Model]
    ) -> tuple[float, Path]:
        """Return the seconds that generate-labels takes from the teachers' first batch
        to the last record, and the path of the store."""
        self.number += 1
        path = Path(shutil.copytree(empty, self.folder / f"{self.number}.zarr"))
        with ExitStack() as stack:
            run, units = self.labeller(config, data, path, teachers, stack)
            shown = stack.enter_context(Progress("", 1, ""))
            run.clock = First()
            run(units, shown)
            settle()
            took = time.perf_counter() - run.clock.first
        assert LabelStore.open(path).finished().all()
        return took, path

    def training(
        self,
        config: Config,
        source: StoredLabels | DrawnCrops,
        data: Path,
        model: Model,
        teachers: list[Model] | None = None,
    ) -> Run:
        source.data = DataSet(ClassFolders(data), source.data.class_names)
        run = Run(
            config, self.folder / "run", model, teachers or [], source, None, Execution(self.device)
        )
        run._save = lambda: None  # a run saves once an epoch, and an epoch here is short
        return run


def bare_steps(
    model: Model, optimizer: torch.optim.Optimizer, memory: list[tuple], precision: str = "float32"
) -> None:
    """Train on batches in memory, (pixels, soft labels) each. Stage two is measured
    against these steps."""
    for pixels, p in memory:
        loss = losses.soft_cross_entropy(model(pixels, precision), p).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def of_a_pass(run: Run) -> float:
    """Return the seconds of one pass over the images. Batches rendered ahead for the
    next pass are dropped: their rendering would go on beside other measurements."""
    took = seconds(run.train_pass)
    run.replay.forget()
    return took


def stored(place: Place, data: Path, config: Config) -> StoredLabels:
    """Label one view by a stand-in, and return its stored labels."""
    made = config.model_copy(update={"crops": config.crops.model_copy(update={"views": 1})})
    nothing = [stand_in(0, place.device)]
    path = place.labelled(made, data, place.empty(made, data, nothing), nothing)[1]
    return stored_labels(LabelStore.open(path), 1)
