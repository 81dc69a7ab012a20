"""Resize crops and central squares with DALI: on a GPU, and on the CPU for stores and
runs that versions before 0.10 began.

A crop is cut out of the decoded image and then resized (``fn.resize`` with a region
gives other pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types

from pipeline.render.dali import Graph
from pipeline.render.settings import RenderSettings
from pipeline.runtime.profiling import Clock
from pipeline.sampling.centre import centre

# A longer image, in multiples of its shorter side, is thin: evaluation resizes only its
# central square. Another number would change the pixels of evaluations.
THIN = 8
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class DaliCrops(Graph):
    """Renders crops of images at one or several output sizes, from one decode per
    image. sizes: in pixels. views: crops of each image."""

    def __init__(
        self,
        sizes: Sequence[int],
        views: int,
        batch_size: int,
        settings: RenderSettings,
        clock: Clock,
    ) -> None:
        super().__init__(batch_size, settings)
        self.clock = clock
        self.sizes, self.views = sizes, views

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        outputs = []
        image = None if self.views == 1 and not self.gpu else decode(encoded)
        for view in range(self.views):
            flip = fn.external_source(name=f"flip{view}", dtype=types.INT32, ndim=0)
            if image is None:
                cut = self.region(encoded, view)
            else:
                start, shape = (
                    fn.external_source(name=f"{what}{view}", dtype=types.INT32, ndim=1)
                    for what in ("start", "shape")
                )
                cut = fn.slice(image, start=start, shape=shape, axes=[0, 1])
            for size in self.sizes:
                resized = fn.resize(
                    cut,
                    size=[size, size],
                    interp_type=_INTERPOLATION[self.settings.interpolation],
                    antialias=True,
                )
                outputs.append(fn.flip(resized, horizontal=flip))
        return outputs

    def render(
        self,
        made: dict[int, torch.Tensor],
        blobs: Sequence[bytes],
        boxes: np.ndarray,
        flips: np.ndarray,
    ) -> None:
        """Render as ``CropRenderer`` does, into ``made``: output size → uint8 [views,
        n, size, size, 3]."""
        arguments: dict[str, np.ndarray] = {}
        for view in range(self.views):
            box = boxes[view].astype(np.int32)
            arguments |= {
                f"start{view}": box[:, :2],
                f"shape{view}": box[:, 2:],
                f"flip{view}": flips[view].astype(np.int32),
            }
        targets = [made[size][view] for view in range(self.views) for size in self.sizes]
        with self.clock.part("decode and resize"):
            self.fill(targets, blobs, **arguments)


class DaliCentre(Graph):
    """Renders central squares (``CentreRenderer``).

    Of a thin image, longer than ``THIN`` times its shorter side, only the central
    square is resized. Its pixels are those of the whole resize, to one level of 255.
    The whole resize would take 11 GB for 1 × 60,000 pixels at 224 px.

    looks: (output size in pixels, interpolation) of each model.
    """

    def __init__(
        self,
        looks: Sequence[tuple[int, str]],
        batch_size: int,
        settings: RenderSettings,
        clock: Clock,
    ) -> None:
        super().__init__(batch_size, settings)
        self.clock = clock
        self.looks = looks

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        image = decode(encoded)
        outputs = []
        for i, (size, interpolation) in enumerate(self.looks):
            low, high, whole = (
                fn.external_source(name=f"{name}{i}", dtype=types.FLOAT, ndim=1)
                for name in ("low", "high", "whole")
            )
            start = fn.external_source(name=f"start{i}", dtype=types.INT32, ndim=1)
            resized = fn.resize(
                image,
                roi_start=low,
                roi_end=high,
                size=whole,
                interp_type=_INTERPOLATION[interpolation],
                antialias=True,
            )
            outputs.append(fn.slice(resized, start=start, shape=[size, size], axes=[0, 1]))
        return outputs

    def render(
        self,
        made: dict[tuple[int, str], torch.Tensor],
        blobs: Sequence[bytes],
        height: np.ndarray,
        width: np.ndarray,
    ) -> None:
        """Render as ``CentreRenderer`` does, into ``made``: (size, interpolation) →
        uint8 [n, size, size, 3]."""
        arguments: dict[str, np.ndarray] = {}
        shape = np.stack([height, width], axis=1).astype(np.int64)
        thin = shape.max(axis=1, keepdims=True) > THIN * shape.min(axis=1, keepdims=True)
        for i, (size, _) in enumerate(self.looks):
            whole, start = centre(shape, size)
            # The region of the decoded image that is resized, in its own pixels.
            low = np.where(thin, start * shape / whole, 0).astype(np.float32)
            high = np.where(thin, (start + size) * shape / whole, shape).astype(np.float32)
            arguments |= {
                f"low{i}": low,
                # Beyond 16 million pixels float32 has no fractions: one step at least.
                f"high{i}": np.maximum(high, np.nextafter(low, np.float32(np.inf))),
                f"whole{i}": np.where(thin, size, whole).astype(np.float32),
                f"start{i}": np.where(thin, 0, start).astype(np.int32),
            }
        with self.clock.part("decode and resize"):
            self.fill([made[look] for look in self.looks], blobs, **arguments)
