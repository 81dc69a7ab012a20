"""Measure the loader beside the loaders that others have: Pillow with torchvision's
transforms, torchvision's transforms of uint8 tensors, and DALI's own resize."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from parts import CLASSES, Figure, Place, one_thread, seconds
from PIL import Image
from support.stages import crop_renderer, drawn_crops, make_replay
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipeline.config import Config
from pipeline.images.data_set import DataSet
from pipeline.images.reader import Reader
from pipeline.images.sources.class_folders import ClassFolders
from pipeline.render.dali import Decoder
from pipeline.render.settings import RenderSettings
from pipeline.training.batches import Replay

SIZE, BATCH = 224, 64
CROPS = (1, 2, 4, 8)  # of each decoded image
# The least ratios that were aimed for: against the better of Pillow and torchvision,
# and against DALI's resize.
AIMS = {1: (1.6, 1.45), 4: (1.5, 2.0)}
PEERS = {"Pillow": "PIL", "torchvision uint8": "tensor", "torchvision uint8, its decoder": "io"}


class Torchvision(torch.utils.data.Dataset):
    """Several crops of each image, made as torchvision's users make them.

    kind: "PIL" decodes, crops and resizes with Pillow; "tensor" decodes with Pillow and
    resizes uint8 tensors; "io" decodes with torchvision too.
    """

    def __init__(self, folder: Path, crops: int, kind: str) -> None:
        self.files, self.crops, self.kind = sorted(folder.glob("*/*.jpg")), crops, kind
        self.crop = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.made(self.files[i].read_bytes())

    def made(self, blob: bytes) -> torch.Tensor:
        """Return crops of an encoded image, uint8 [crops, 3, size, size]."""
        picture = decoded(blob, self.kind)
        return torch.stack([as_tensor(self.crop(picture)) for _ in range(self.crops)])


def decoded(blob: bytes, kind: str) -> Image.Image | torch.Tensor:
    if kind == "io":
        encoded = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    picture = Image.open(io.BytesIO(blob)).convert("RGB")
    return picture if kind == "PIL" else F.pil_to_tensor(picture)


def as_tensor(made: Image.Image | torch.Tensor) -> torch.Tensor:
    return F.pil_to_tensor(made) if isinstance(made, Image.Image) else made


def milliseconds(do: Callable[[], object], crops: int, repeats: int) -> list[float]:
    """Return the milliseconds of all cores a crop of each of some calls."""
    do()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        do()
        found.append(1000 * (time.process_time() - begun) / crops)
    return found


def of_a_core(place: Place) -> Iterator[Figure]:
    """Compare CPU milliseconds a crop on one thread, from encoded images in memory to
    pixels in memory."""
    config, found = place.config(), place.manifest
    some = found.usable[: place.extent.photographs]
    with Reader(DataSet(ClassFolders(place.many), CLASSES), found, 1) as read:
        blobs = read(some)
    for crops in CROPS:
        source = drawn(place, config, crops)
        boxes, flips = (
            np.stack(column)
            for column in zip(*(source.crops(v, some) for v in range(crops)), strict=True)
        )
        with one_thread():
            took = {
                name: milliseconds(do, len(blobs) * crops, place.repeats)
                for name, do in ways(place, blobs, boxes, flips).items()
            }
        yield from ratios("CPU time", crops, took, "ms a crop on one thread")


def ways(
    place: Place, blobs: list[bytes], boxes: np.ndarray, flips: np.ndarray
) -> dict[str, Callable[[], object]]:
    """Return what makes all crops (boxes [crops, n, 4]) of encoded images, by name."""
    crops, parts = len(boxes), [slice(i, i + BATCH) for i in range(0, len(blobs), BATCH)]
    found: dict[str, Callable[[], object]] = {}
    for name, resize in (("ours", "pillow"), ("DALI's resize", "dali")):
        made = crop_renderer([SIZE], crops, BATCH, threads=1, resize=resize)
        found[name] = lambda made=made: [made(blobs[p], boxes[:, p], flips[:, p]) for p in parts]
    for name, kind in PEERS.items():
        peer = Torchvision(place.many, crops, kind)
        found[name] = lambda peer=peer: [
            torch.stack([peer.made(blob) for blob in blobs[p]]) for p in parts
        ]
    decoder = Decoder(BATCH, RenderSettings(threads=1), regions=crops == 1)
    found["the bare decode"] = lambda: [
        decoder(blobs[p], boxes[0, p] if decoder.regions else None) for p in parts
    ]
    return found


def of_all_cores(place: Place) -> Iterator[Figure]:
    """Compare whole loaders on all cores, from files to batches: ours with digests
    verified, torchvision's in a DataLoader with a process for each core."""
    processes, found, config = len(os.sched_getaffinity(0)), place.manifest, place.config()
    for crops in CROPS:
        source = drawn(place, config, crops)

        def ours(resize: str, source: object = source, crops: int = crops) -> Replay:
            source.settings = RenderSettings(resize=resize)
            return make_replay(
                source,
                place.many,
                sizes=[SIZE],
                batch_size=BATCH * crops,
                seed=0,
                crops_per_image=crops,
            )

        loaders = {"ours": ours("pillow"), "DALI's resize": ours("dali")}
        loaders |= {
            name: torch.utils.data.DataLoader(
                Torchvision(place.many, crops, kind),
                BATCH,
                shuffle=True,
                num_workers=processes,
                persistent_workers=True,
            )
            for name, kind in PEERS.items()
        }

        def load(loader: Replay | torch.utils.data.DataLoader) -> None:
            if isinstance(loader, Replay):
                with loader.epoch(0) as batches:
                    for _ in batches:
                        pass
            else:
                for _ in loader:
                    pass

        took: dict[str, list[float]] = {name: [] for name in loaders}
        for repeat in range(place.repeats + 1):
            for name, loader in loaders.items():
                each = 1000 * seconds(lambda loader=loader: load(loader)) / (len(found) * crops)
                if repeat:  # the first time also starts processes and threads
                    took[name].append(each)
        del loaders  # ends the processes
        yield from ratios("loader", crops, took, f"ms a crop on {processes} cores")


def drawn(place: Place, config: Config, crops: int) -> object:
    policy = config.crops.model_copy(update={"views": crops})
    return drawn_crops(place.manifest, CLASSES, policy, crops, (len(place.manifest),) * 2)


def ratios(what: str, crops: int, took: dict[str, list[float]], unit: str) -> Iterator[Figure]:
    """Compare with the better of Pillow and torchvision, and with DALI's resize."""
    median = {name: statistics.median(values) for name, values in took.items()}
    better = min(("Pillow", "torchvision uint8"), key=median.__getitem__)
    detail = ", ".join(f"{name} {value:.3f}" for name, value in median.items())
    aims = AIMS.get(crops, (None, None))
    rate = f"{1000 / median['ours']:,.0f} crops/s"
    for other, aim, told in (
        (better, aims[0], f"{unit}: {detail}"),
        ("DALI's resize", aims[1], rate),
    ):
        yield Figure(
            f"{what}, {crops} crop{'s' * (crops > 1)} a decode: {other} / ours",
            [a / b for a, b in zip(took[other], took["ours"], strict=True)],
            aim,
            told,
        )


def the_loader(place: Place) -> Iterator[Figure]:
    yield from of_a_core(place)
    yield from of_all_cores(place)
