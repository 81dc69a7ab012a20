"""Serve the crops and soft labels of a store to any trainer, as a dataset of torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.images.data_set import DataSet
from pipeline.images.reader import Reader, naming
from pipeline.loading.blocks import Blocks
from pipeline.loading.decoder import Decoder
from pipeline.loading.options import Options
from pipeline.loading.sampler import StoredCropsSampler
from pipeline.render.one_crop import OneCrop
from pipeline.render.settings import RenderSettings
from pipeline.sampling.cutmix import pixel_box

# What a forked process has from its parent. A DALI pipeline in it must never be dropped
# here: dropping it would wait for threads that don't exist.
_foreign: list[Any] = []


class StoredCrops(Dataset):
    """The crops of one view of a label store, with their soft labels.

    ``dataset[i]`` is ``(pixels, label)``: pixels uint8 [3, image_size, image_size] in
    RGB, and label float32 [classes], probabilities above zero whose sum is one.
    ``torch.nn.functional.cross_entropy(model(normalised pixels), label)`` is the soft
    cross-entropy of MEAL V2 (arXiv 2009.08453). The items are the store's usable
    images, in the order of its rows, which is random.

    store: a label store. data: its images, as ``--data`` takes them. image_size: of the
    pixels; the crops are those of the store at every size. transform: a function of the
    pixels. A transform that moves pixels, such as a flip or another crop, parts the
    picture from its label. options: keyword arguments, see
    ``pipeline.loading.options.Options``. Raises MealError for what doesn't fit
    together.

    Every process that reads items, such as a worker of a DataLoader, opens the store
    for itself.
    """

    def __init__(
        self,
        store: str | Path,
        data: str | Path | DataSet,
        *,
        image_size: int = 224,
        transform: Callable[[torch.Tensor], Any] | None = None,
        **options: Any,
    ) -> None:
        from pipeline.loading.opening import opened

        asked = Options(image_size=image_size, **options)
        self.store, self.data, self.layout = opened(store, data, asked)
        self.image_size, self._transform, self.codes = image_size, transform, asked.codes
        self.views = asked.views or self.store.views
        images = self.store.images
        self.rows: np.ndarray = images.usable
        self.class_names: list[str] = self.store.class_names
        # int64 [items], of the class that the data tells; -1 where nothing tells it.
        self.class_index: np.ndarray = images.class_index[self.rows].astype(np.int64)
        # In shared memory, so that workers that live on see the new epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._own: _Own | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        n = len(self.rows)
        if not -n <= index < n:
            raise IndexError(f"StoredCrops has items 0 to {n - 1}, asked for {index}")
        own = self._opened()
        pixels, label = own.item(self.view, int(self.rows[index]))
        made = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self._transform is not None:
            made = self._transform(made)
        return made, torch.from_numpy(label)

    @property
    def transform(self) -> Callable[[torch.Tensor], Any] | None:
        """Return the transform that was passed."""
        return self._transform

    @transform.setter
    def transform(self, value: object) -> None:
        raise AttributeError(
            "StoredCrops takes its transform at the start, since the crops are stored; if "
            "timm.data.create_loader set one, use torch's DataLoader and timm's PrefetchLoader"
        )

    @property
    def epoch(self) -> int:
        """Return the epoch that ``set_epoch`` set, 0 at first."""
        return int(self._epoch)

    @property
    def view(self) -> int:
        """Return the view that is shown now: epoch mod views."""
        return self.epoch % self.views

    def set_epoch(self, epoch: int) -> None:
        """Show the view ``epoch`` mod ``views``, in every worker. Call it between two
        passes. ``sampler().set_epoch`` calls it, too."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._epoch[0] = epoch

    def sampler(
        self,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
    ) -> StoredCropsSampler:
        """Make a sampler that reads few chunks of the store at a time
        (``StoredCropsSampler``). rank, world: this process of how many; None: as
        torch.distributed says, or 0 of 1."""
        return StoredCropsSampler(
            self, seed=seed, shuffle=shuffle, part=(rank, world), drop_last=drop_last
        )

    def decoder(self, device: torch.device | str = "cpu") -> Decoder:
        """Return what decodes a batch of codes [n, columns] on a device, to float32 [n,
        classes]."""
        return Decoder(self.store.codec, device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None}

    def _opened(self) -> _Own:
        if self._own is None or self._own.process != os.getpid():
            if self._own is not None:
                _foreign.append(self._own)
            self._own = _Own(self)
        return self._own


class _Own:
    """What one process has open: the store, the images, and chunks of the store."""

    def __init__(self, dataset: StoredCrops) -> None:
        self.process = os.getpid()
        store = dataset.store.reopened()
        self.images, self.decode = store.images, None if dataset.codes else store.codec.decode
        self.blocks = Blocks(store, dataset.layout)
        self.read = Reader(dataset.data, store.images, threads=1)
        self.render = OneCrop(dataset.image_size, RenderSettings.of_store(store))

    def item(self, view: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels uint8 [size, size, 3] of a row, mixed if the store has
        CutMix, and its label."""
        block, place = self.blocks.of(view, row)
        pixels = self._crop(view, row)
        crops = block.crops
        if crops.partner is not None and (partner := int(crops.partner[place])) >= 0:
            ((top, left, bottom, right),) = pixel_box(
                crops.rectangle[place : place + 1], len(pixels)
            ).tolist()
            if bottom > top and right > left:
                theirs = self._crop(view, partner)
                pixels[top:bottom, left:right] = theirs[top:bottom, left:right]
        codes = block.codes[place : place + 1]
        return pixels, (codes.copy() if self.decode is None else self.decode(codes))[0]

    def _crop(self, view: int, row: int) -> np.ndarray:
        block, place = self.blocks.of(view, row)
        blob = self.read.one(row)
        with naming(self.images, np.array([row])):
            return self.render(blob, block.crops.boxes[place], bool(block.crops.flips[place]))
